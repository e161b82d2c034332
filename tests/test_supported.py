"""The list of model types that were tried: who may write it, what the README and the command make of it."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from conformance.trial import try_type
from conformance.types import model_types
from tiny import tiny_model
from typer.testing import CliRunner

from hf_layerprobe import LayerProbeError, supported
from hf_layerprobe.cli import app


@pytest.mark.parametrize(
    "model_type", ["llama", "t5", pytest.param("gemma4_text", marks=pytest.mark.model_type("gemma4_text")), "albert"]
)
def test_the_list_says_what_a_trial_finds(model_type):
    stored, found = supported.read(), try_type(model_type)
    assert found["outcome"] == stored["types"][model_type]["outcome"]
    if stored["versions"] == supported.versions():  # details of other versions are not on the list
        assert found == stored["types"][model_type]


def test_every_type_is_on_the_list():
    stored = supported.read()
    if stored["versions"]["transformers"] == supported.versions()["transformers"]:
        assert list(stored["types"]) == list(model_types())
    assert {record["outcome"] for record in stored["types"].values()} <= supported.OUTCOMES.keys()


def test_the_readme_says_what_the_list_says():
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert supported.table(supported.read()["types"]) in readme


def test_the_list_is_not_changed_by_hand(tmp_path, monkeypatch):
    content = supported.read()
    content["types"]["albert"]["outcome"] = "pruned"
    tmp_path.joinpath(supported.NAME).write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(supported, "files", lambda package: tmp_path)
    with pytest.raises(LayerProbeError, match=r"changed by hand; only `python -m tests.conformance --write`"):
        supported.read()


def test_all_types_are_tried_again_where_other_code_wrote_the_list(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):  # which the module sets
        monkeypatch.setenv(name, "1")
    conformance = import_module("conformance.__main__")
    stored, tried = supported.read() | {"versions": supported.versions()}, []

    def run(types, _processes, _trial, journal):
        tried.extend(types)
        journal.touch()
        return stored["types"]

    monkeypatch.setattr(conformance, "run", run)
    monkeypatch.setattr("sys.argv", ["conformance", "--if-changed"])
    monkeypatch.setattr(supported, "read", lambda: stored | {"code": conformance.fingerprint()})
    assert conformance.main() == 0 and not tried
    monkeypatch.setattr(supported, "read", lambda: stored | {"code": "0" * 16})
    assert conformance.main() == 0 and tried == list(model_types())


def test_the_lowest_versions_are_those_that_ci_runs():
    root = Path(__file__).parents[1]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', root.joinpath("pyproject.toml").read_text(encoding="utf-8")))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", root.joinpath("constraints-lowest.txt").read_text(), re.MULTILINE))
    # torch is explained there; hatchling and ruff run no test.
    for name in bounds.keys() - {"torch", "hatchling", "ruff"}:
        assert f"{pins[name]}.".startswith(f"{bounds[name]}."), name


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["supports", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_knows_types_and_folders(tmp_path):
    assert "llama: pruned" in run("llama").stdout and "model.layers" in run("llama").stdout
    assert "no stack" in run("albert").stdout
    tiny_model("qwen3").save_pretrained(tmp_path)
    found = json.loads(run(tmp_path, "--json").stdout)
    assert found["type"] == "qwen3" and found["outcome"] == "pruned"
    assert set(found["stacks"][0]["sets"].values()) == {"equal"}


def test_the_command_says_what_it_does_not_know(tmp_path):
    result = run("lama", code=2)
    assert "Types with names like it: " in result.stderr and "llama" in result.stderr
    tmp_path.joinpath("config.json").write_text('{"model_type": "novel"}', encoding="utf-8")
    assert "'novel' were not tried" in run(tmp_path, code=2).stderr

"""The commands: what they print, the codes they end with, and what they leave behind."""

import json
import re
import subprocess
import sys

import pytest
import torch
from tiny import TEXT, tiny_folder
from transformers import AutoModelForCausalLM, JambaConfig, JambaForCausalLM
from typer.testing import CliRunner

from hf_layerprobe import PruningPlan, __version__, evaluate_model, plan_pruning
from hf_layerprobe.cli import app
from hf_layerprobe.cli.inputs import halves
from hf_layerprobe.cli.outputs import number, ranges, strict
from hf_layerprobe.loading import load_model, load_tokenizer
from hf_layerprobe.surgery import gate

TEXTS = [f"paragraph {i}: the quick brown fox jumps over the lazy dog {i * 7919} times." for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(TEXTS))
    return str(path)


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exit_code != code and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from typer.testing import CliRunner; from hf_layerprobe.cli import app; "
        "results = [CliRunner().invoke(app, [*c, '--help']) for c in "
        "([], ['demo'], ['docs'], ['avss'], ['plan'], ['prune'], ['prune-files'], ['push'], ['eval'])]; "
        "assert all(r.exit_code == 0 and 'Usage' in r.stdout for r in results); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_version():
    assert run("--version").stdout.strip() == __version__


def test_docs_prints_a_table_and_draws_maps(model, tmp_path):
    result = run("docs", model, "--kinds", "q,k", "--figures", tmp_path / "maps")
    assert "chance" in result.stdout and "model.layers" in result.stdout
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["docs_k.png", "docs_q.png"]


def test_docs_json(model):
    content = json.loads(run("docs", model, "--kinds", "q", "--axis", "in", "--json").stdout)
    assert list(content["values"]) == ["q"] and content["axis"] == "in"
    assert content["values"]["q"][2][2] == 1 and content["note"] is None


@pytest.mark.parametrize("variant", ["published", "released", "relative"])
def test_avss(model, text, variant):
    content = json.loads(run("avss", model, "--variant", variant, "--text", text, "--json").stdout)
    assert content["name"] == f"avss-{variant}" and len(content["values"]) == 4
    table = run("avss", model, "--variant", variant, "--text", text).stdout
    assert f"avss-{variant}" in table
    assert ("our own definition" in table) == (variant == "relative")


def test_max_tokens_bounds_the_pass(model, text):
    few, many = (
        json.loads(run("avss", model, "--text", text, "--max-tokens", tokens, "--json").stdout)["data"]["tokens"]
        for tokens in (2, 10_000)
    )
    assert 0 < few <= many < 10_000


def test_jsonl_gives_the_same_as_text(model, text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": t}) for t in TEXTS))
    one = json.loads(run("avss", model, "--text", text, "--json").stdout)
    two = json.loads(run("avss", model, "--text", path, "--column", "body", "--json").stdout)
    assert one == two


def test_plan_writes_what_prune_reads(model, text, tmp_path):
    plan_file = tmp_path / "plan.json"
    result = run("plan", model, "--ratio", 0.5, "--text", text, "--output", plan_file)
    plan = PruningPlan.load(plan_file)
    assert len(plan.remove) == 2 and len(plan.candidates) == 6
    assert all(candidate["by"] in result.stdout for candidate in plan.candidates)
    run("prune", model, "--plan", plan_file, "--output", tmp_path / "pruned")
    assert PruningPlan.load(tmp_path / "pruned") == plan
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_hidden_layers == 2


def test_plan_json_is_the_plan(model, text, tmp_path):
    content = json.loads(run("plan", model, "--keep", "0,3", "--json").stdout)
    assert content["remove"] == [1, 2] and content["by"] == "explicit"
    options = ("plan", model, "--ratio", 0.5, "--by", "docs", "--text", text, "--output", tmp_path / "plan.json")
    assert run(*options, "--json").stdout == (tmp_path / "plan.json").read_text()


def test_rules_of_the_weights_read_no_text(model):
    content = json.loads(
        run("plan", model, "--by", "last", "--num-layers", 1, "--text", "missing.txt", "--json").stdout
    )
    assert content["remove"] == [3]


def test_prune_says_what_it_did(model, tmp_path):
    result = run("prune", model, "--remove", "1,-1", "--output", tmp_path / "out")
    assert "1, 3" in result.stdout and "verified" in result.stdout
    pruned = load_model(tmp_path / "out")
    assert pruned.config.num_hidden_layers == 2
    assert load_tokenizer(tmp_path / "out")("abc")["input_ids"] == load_tokenizer(model)("abc")["input_ids"]


def test_a_model_without_tokenizer_is_pruned_without(tmp_path):
    source = tiny_folder(tmp_path / "vit", "vit")
    for file in source.glob("tokenizer*"):
        file.unlink()
    result = run("prune", source, "--by", "last", "--num-layers", 1, "--output", tmp_path / "out")
    assert "no tokenizer" in result.stderr
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3


def test_the_loss_gate_is_at_the_measured_increase(model, text, tmp_path):
    def prune(limit, output, code):
        return run(
            "prune", model, "--remove", "0,1", "--text", text, "--max-loss-increase", limit, "--output", output, "--json",
            code=code,
        )  # fmt: skip

    kept = json.loads(prune(1000, tmp_path / "kept", 0).stdout)["loss"]
    assert kept["increase"] == pytest.approx(kept["after"] / kept["before"] - 1) and kept["increase"] > 0.01
    held_out = halves(TEXTS)[1]
    saved = evaluate_model(load_model(tmp_path / "kept"), held_out, tokenizer=load_tokenizer(model))
    assert saved.loss == pytest.approx(kept["after"], abs=1e-5)

    prune(kept["increase"] * 1.01, tmp_path / "just", 0)
    assert (tmp_path / "just" / "model.safetensors").is_file()
    refused = prune(kept["increase"] * 0.99, tmp_path / "refused", 1)
    assert "rises" in refused.stderr and refused.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["just", "kept"]


def test_prune_repairs_and_measures_the_repaired_model(model, tmp_path):
    texts = [f"paragraph {i}: the quick brown fox jumps over the lazy dog {i * 7919} times." for i in range(80)]
    text, output = tmp_path / "long.txt", tmp_path / "out"
    text.write_text("\n\n".join(texts))
    asked = ["prune", model, "--remove", 1, "--repair", "closed-form", "--text", text, "--output", output]
    found = json.loads(run(*asked, "--max-loss-increase", 1000, "--json").stdout)
    assert found["repair"]["method"] == "closed-form" and PruningPlan.load(output).repair == found["repair"]
    saved = evaluate_model(load_model(output), halves(texts)[1], tokenizer=load_tokenizer(model))
    assert saved.loss == pytest.approx(found["loss"]["after"], abs=1e-5)
    assert (
        "not known; expected one of 'closed-form'"
        in run(*asked[:-4], "--output", tmp_path / "no", "--repair", "magic", code=2).stderr
    )
    assert not (tmp_path / "no").exists()


def test_a_model_that_fails_its_check_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setitem(gate.TOLERANCE, torch.float32, -1.0)
    result = run("prune", model, "--remove", "1", "--output", tmp_path / "out", code=1)
    assert "does not compute" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_eval_alone_and_beside_its_baseline(model, text, tmp_path):
    alone = json.loads(run("eval", model, "--text", text, "--json").stdout)
    expected = evaluate_model(load_model(model), TEXTS, tokenizer=load_tokenizer(model))
    assert alone["after"]["perplexity"] == pytest.approx(expected.perplexity) and alone["before"] is None
    run("prune", model, "--remove", "1,2", "--output", tmp_path / "out")
    both = json.loads(run("eval", tmp_path / "out", "--baseline", model, "--text", text, "--json").stdout)
    assert both["before"] == alone["after"] and both["perplexity_ratio"] != 1
    assert "bits per byte" in run("eval", tmp_path / "out", "--baseline", model, "--text", text).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "MODEL", "--by", "influense", "--ratio", "0.5"], "Did you mean 'influence'"),
        (["plan", "MODEL"], "exactly one of"),
        (["plan", "MODEL", "--remove", "1,x"], "separated by commas"),
        (["plan", "MODEL", "--remove", "9"], "layers 0 to 3"),
        (["plan", "MODEL", "--ratio", "0.5", "--text", "missing.txt"], "missing.txt"),
        (["docs", "./missing-folder"], "There is no folder"),
        (["docs", "MODEL", "--kinds", "w"], "Unknown matrix kinds"),
        (["docs", "MODEL", "--stack", "decoder"], "no stack 'decoder'"),
        (["docs", "MODEL", "--axis", "up"], "axis"),
        (["avss", "MODEL", "--variant", "new", "--text", "TEXT"], "Unknown AVSS variant"),
        (["eval", "MODEL", "--max-tokens", "0"], "max-tokens"),
        (["prune", "MODEL", "--output", "FULL", "--remove", "1"], "not an empty folder"),
        (["prune", "MODEL", "--output", "NEW", "--plan", "TEXT"], "not a pruning plan"),
        (["prune", "MODEL", "--output", "NEW", "--plan", "TEXT", "--ratio", "0.5"], "leave out --ratio"),
        (
            ["prune", "MODEL", "--output", "NEW", "--plan", "TEXT", "--by", "last", "--stack", "foo"],
            "leave out --by, --stack",
        ),
        (["prune", "MODEL", "--output", "NEW", "--plan", "TEXT", "--text", "TEXT"], "leave out --text"),
        (["prune", "MODEL", "--remove", "1"], "--output"),
        (["prune-files", "FULL", "--remove", "1", "--output", "NEW"], "Cannot open the checkpoint"),
        (["demo", "--output", "FULL"], "not an empty folder"),
        (["unknown"], "unknown"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_a_reason(args, message, model, text, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    names = {"MODEL": model, "TEXT": text, "FULL": full, "NEW": tmp_path / "new"}
    result = run(*(names.get(arg, arg) for arg in args), code=2)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and [p.name for p in full.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', r"line 2.*found: body.*--column"),
        ("a.jsonl", "{", "line 1, is not JSON"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", "one\n\ntwo", "at least 4"),
    ],
)
def test_texts_that_cannot_be_used(name, content, message, model, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("plan", model, "--by", "influence", "--num-layers", 1, "--text", path, code=2)
    assert re.search(message, " ".join(result.stderr.split()))


def test_a_bug_keeps_its_traceback(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("hf_layerprobe.cli.inputs.load_model", broken)
    result = CliRunner().invoke(app, ["docs", model])
    assert isinstance(result.exception, RuntimeError)


def test_stdout_is_json_alone(model, text):
    done = subprocess.run(
        [sys.executable, "-c", "from hf_layerprobe.cli import main; main()", "eval", model, "--text", text, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["after"]["tokens"] > 0
    assert "Perplexity" in done.stderr  # the progress bar


def test_demo(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_layerprobe.cli.demo_steps.embedded_texts", lambda: TEXTS)
    result = run("demo", "--model", model, "--small", "--output", tmp_path / "demo")
    for label in ("dense model", "AVSS, published", "AVSS, relative (ours)", "block influence (ShortGPT)", "random-0"):
        assert label in result.stdout
    found = json.loads((tmp_path / "demo" / "results.json").read_text())
    best = min(found["rules"], key=lambda row: row["loss"])
    assert best["rule"] == found["best"] and len(found["rules"]) == 5
    assert found["proof"]["same"] and found["proof"]["cached_equals_uncached"]
    assert found["pruned"]["loss"] == pytest.approx(best["loss"], abs=1e-5)
    figures = {f"figures/{name}.png" for name in ("overview", "scores_by_depth", "docs_q", "docs_up")}
    assert set(found["figures"]) == figures
    assert all((tmp_path / "demo" / figure).stat().st_size > 1000 for figure in figures)
    plan = PruningPlan.load(tmp_path / "demo" / "pruned")
    assert plan.by == found["best"] and list(plan.remove) == best["removed"] and plan.scores["name"]
    assert load_model(tmp_path / "demo" / "pruned").config.num_hidden_layers == 3


def test_demo_leaves_nothing_when_the_saved_model_is_another(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_layerprobe.cli.demo_steps.embedded_texts", lambda: TEXTS)
    monkeypatch.setattr("hf_layerprobe.cli.demo_steps.TOLERANCE", {torch.float32: -1.0})
    run("demo", "--model", model, "--small", "--output", tmp_path / "demo", code=1)
    assert list(tmp_path.iterdir()) == []


def test_short_forms():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""
    assert [number(value) for value in (0, 12.345, 1234.5, 234567.0, 1e-5)] == [
        "0.00",
        "12.35",
        "1,234",
        "2.3e+05",
        "1.0e-05",
    ]
    assert strict({"a": [float("nan"), float("inf"), 1.5, "x"]}) == {"a": [None, None, 1.5, "x"]}


def test_docs_of_layers_that_stand_apart(tmp_path):
    """Jamba's attention layers have no neighbour with a q matrix: a dash, not a traceback."""
    config = JambaConfig(
        **TEXT, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=4,
    )  # fmt: skip
    JambaForCausalLM(config).save_pretrained(tmp_path / "jamba")
    assert "–" in run("docs", tmp_path / "jamba", "--kinds", "q", "--figures", tmp_path / "figures").stdout


@pytest.mark.parametrize("by", ["greedy", "contiguous", "combined"])
def test_every_rule_has_text(by, model, text):
    found = json.loads(run("plan", model, "--by", by, "--num-layers", 1, "--text", text, "--json").stdout)
    assert len(found["remove"]) == 1


def test_line_separators_inside_a_row(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "one\u2028line of text"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    run("eval", model, "--text", file)


@pytest.mark.parametrize("by", ["influence", "auto"])
def test_eval_says_when_the_plan_has_seen_the_text(by, model, text, tmp_path, caplog):
    run("prune", model, "--by", by, "--num-layers", 1, "--text", text, "--output", tmp_path / "smaller")
    run("eval", tmp_path / "smaller", "--text", text)
    assert "These texts are the plan's own calibration data" in caplog.text


def test_an_unknown_repair_is_said_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_layerprobe.cli.inputs.open_model", lambda *_: pytest.fail("the model was opened"))
    found = run("prune", model, "--num-layers", 1, "--repair", "nonsense", "--output", tmp_path / "smaller", code=2)
    assert "repair='nonsense' is not known" in found.output


def test_every_stack_is_reported(tmp_path):
    folder, plan = tiny_folder(tmp_path / "t5", "t5"), tmp_path / "plan.json"
    plan_pruning(load_model(folder), remove={"encoder.block": [1], "decoder.block": [2, 3]}).save(plan)
    found = json.loads(run("prune", folder, "--plan", plan, "--output", tmp_path / "one", "--json").stdout)
    assert {each["stack"]: each["remove"] for each in found["stacks"]} == {
        "encoder.block": [1],
        "decoder.block": [2, 3],
    }
    shown = run("prune", folder, "--plan", plan, "--output", tmp_path / "two").stdout
    assert "encoder.block" in shown and "decoder.block" in shown


def test_a_misspelled_plan_is_no_repository(model, tmp_path):
    found = run("prune", model, "--plan", "plam.json", "--output", tmp_path / "small", code=2)
    assert "No pruning plan at 'plam.json'" in " ".join(found.output.split())

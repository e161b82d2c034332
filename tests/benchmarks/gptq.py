"""GPTQ of a pruned model through optimum: what 4 bits cost it, and that its layers can still be removed in its files.

    pip install --no-deps gptqmodel==7.6.0 device-smi pypcre tokenicer logbar defuser
    python tests/benchmarks/gptq.py

Runs on a CPU. The model is the embedded one without seven layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
from transformers.utils import logging

from hf_layerprobe import avss, docs, evaluate_model, prune_checkpoint, prune_layers
from hf_layerprobe.embedded import embedded_model, embedded_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=16, help="for calibration")
    parser.add_argument("--held-out", type=int, default=8)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer, texts = AutoTokenizer.from_pretrained(embedded_model()), embedded_texts()
    calibration, held_out = texts[: arguments.texts], texts[-arguments.held_out :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = prune_layers(embedded_model(), remove=range(12, 19), output_dir=folder / "small", tokenizer=tokenizer)
        settings = GPTQConfig(bits=4, group_size=64, dataset=calibration, tokenizer=tokenizer, backend="torch")
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            folder / "small", quantization_config=settings, dtype=torch.float32
        )
        seconds = time.perf_counter() - start
        model.save_pretrained(folder / "gptq")
        tokenizer.save_pretrained(folder / "gptq")
        model = AutoModelForCausalLM.from_pretrained(folder / "gptq", dtype=torch.float32)
        found = [evaluate_model(each, held_out, tokenizer=tokenizer).perplexity for each in (small, model)]
        print(
            f"{model.config.num_hidden_layers} layers in 4 bits in {seconds:.0f} s; perplexity {found[0]:.1f}, then {found[1]:.1f}"
        )
        q = [docs(each, kinds=["q"])["q"][0, 1] for each in (small, model)]
        values = [avss(each, held_out[:2], tokenizer=tokenizer).values[:3].round(3) for each in (small, model)]
        print(
            f"DOCS of q in layers 0 and 1: {q[0]:.4f}, then {q[1]:.4f}; AVSS of layers 0 to 2: {values[0]}, then {values[1]}"
        )
        prune_checkpoint(folder / "gptq", remove=[5], output_dir=folder / "smaller")  # compared by running both
        print("One more layer was removed in its files; both models ran and agree.")


if __name__ == "__main__":
    main()

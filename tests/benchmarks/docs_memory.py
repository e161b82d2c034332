"""Peak memory of DOCS beside the model, for layers of Llama-3-8B's shapes with random weights in bfloat16.

    python tests/benchmarks/docs_memory.py [--layers 3] [--kinds up k down]

Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_layerprobe import docs


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["up", "k", "down"])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    sizes = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=arguments.layers))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_()
    docs(LlamaForCausalLM(LlamaConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)))
    ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed would hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before, start = peak_megabytes(), time.perf_counter()
    found = docs(model, kinds=arguments.kinds)
    print(
        f"{arguments.layers} layers, {', '.join(found.kinds)}: {peak_megabytes() - before:.0f} MB beside the model, ",
        end="",
    )
    print(f"{time.perf_counter() - start:.1f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()

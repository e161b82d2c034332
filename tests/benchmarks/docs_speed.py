"""How long DOCS takes, against what a user would write and against the bare matrix products, in one run.

    python tests/benchmarks/docs_speed.py [--layers 10] [--threads 2] [--repeats 3]

Every pair of the first layers of the embedded SmolLM2, all seven kinds of matrices, in float32. The plain script normalises,
takes the float32 product, the absolute values and both maxima, and fits each sample with `scipy.stats.gumbel_r.fit`. On a
machine that is not idle, compare the processor's seconds of runs with one thread.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from statistics import median

import torch
from scipy.stats import gumbel_r
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_layerprobe import docs, find_stacks
from hf_layerprobe.embedded import embedded_model
from hf_layerprobe.scores import native
from hf_layerprobe.weights import read_matrices


def plain_script(matrices: dict, some: list, dtype: torch.dtype = torch.float32) -> dict:
    units = {key: torch.nn.functional.normalize(matrix.to(dtype), dim=1) for key, matrix in matrices.items()}
    values = {}
    for kind, i, j in some:
        cosines = (units[kind, i] @ units[kind, j].T).abs()
        locations = [gumbel_r.fit(cosines.amax(dim).numpy())[0] for dim in (1, 0)]
        values[kind, i, j] = sum(locations) / 2
    return values


def products(matrices: dict, dtype: torch.dtype) -> None:
    units = {key: torch.nn.functional.normalize(matrix, dim=1).to(dtype) for key, matrix in matrices.items()}
    buffers = {len(unit): torch.empty(len(unit), len(unit), dtype=dtype) for unit in units.values()}
    for kind, i, j in pairs(matrices):
        torch.mm(units[kind, i], units[kind, j].T, out=buffers[len(units[kind, i])])


def pairs(matrices: dict) -> list:
    layers = sorted({layer for _, layer in matrices})
    return [(kind, i, j) for kind in dict.fromkeys(k for k, _ in matrices) for i, j in combinations(layers, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    layers = range(arguments.layers)
    matrices = {(kind, i): m for i, kind, m in read_matrices(find_stacks(model)[0]) if i in layers}
    everything = pairs(matrices)
    docs(model, layers=range(2))  # compiles, or probes the processor, once
    found: dict = {}
    runs = {
        "plain script": lambda: found.update(script=plain_script(matrices, everything)),
        "hf_layerprobe.docs": lambda: found.update(docs=docs(model, layers=layers)),
        "bare float32 products": lambda: products(matrices, torch.float32),
        "bare bfloat16 products": lambda: products(matrices, torch.bfloat16),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_processor)
    search = "torch" if native.kernel() is None else "compiled search (AMX)"
    shapes = sorted({tuple(matrix.shape) for matrix in matrices.values()})
    print(f"{len(everything)} pairs of float32 matrices {shapes}, {search}, torch {torch.__version__}")
    print(f"{arguments.threads} threads, medians of {arguments.repeats}; each also times hf_layerprobe.docs")
    ours = [median(seconds["hf_layerprobe.docs"]) for seconds in (wall, processor)]
    for name in runs:
        medians = [median(seconds[name]) for seconds in (wall, processor)]
        columns = [f"{m:9.3f} s {m / own:6.2f} x" for m, own in zip(medians, ours, strict=True)]
        print(f"{name:24s} {columns[0]}   of the processors {columns[1]}")
    some = everything[:: max(1, len(everything) // 60)]
    exact = plain_script(matrices, some, torch.float64)
    deviation = max(abs(found["docs"][kind][i, j] - exact[kind, i, j]) for kind, i, j in some)
    plain = max(abs(found["script"][key] - exact[key]) for key in some)
    print(f"largest deviation from float64 on {len(some)} pairs: {deviation:.1e} (plain script {plain:.1e})")


if __name__ == "__main__":
    main()

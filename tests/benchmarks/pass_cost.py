"""What scores cost beside the plain forward pass of the embedded SmolLM2, in one run.

    python tests/benchmarks/pass_cost.py [--threads 2] [--repeats 15]

Each round runs the plain pass, the pass with relative AVSS and block influence, the pass with every score that is measured on
activations, and `score_layers`, which leaves out the logits; the medians are compared. Memory is the peak of the process
over that of the plain pass, of both without the head but for `score_layers`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_layerprobe import find_stacks, score_layers
from hf_layerprobe.activations import LayerStream
from hf_layerprobe.embedded import embedded_model
from hf_layerprobe.scores.registry import SCORES

PLAIN = "plain forward pass"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def watched(stack, names):
    """The hooks of these scores; scores that share an accumulator get one."""
    makes = dict.fromkeys(SCORES[name].make for name in names)
    return LayerStream(stack, [make(stack.num_layers) for make in makes]) if names else nullcontext()


def peak_megabytes(run) -> float:
    """Largest memory of the process while this runs (Linux), median of three."""
    peaks = []
    for _ in range(3):
        RESET.write_text("5")
        run()
        peaks += [int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return median(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    ids = torch.randint(0, model.config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    runs = {
        PLAIN: [],
        "avss-relative + influence": ["avss-relative", "influence"],
        "every score of activations": [name for name, score in SCORES.items() if score.streams],
    }

    def forward(module, names):
        with watched(find_stacks(module)[0], names), torch.no_grad():
            module(input_ids=ids, use_cache=False)

    def scores():
        score_layers(model, [{"input_ids": ids}], by=["avss-relative", "influence"])

    timed = {name: partial(forward, model, names) for name, names in runs.items()} | {"score_layers": scores}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for run in timed.values():
        run()
    for _ in range(arguments.repeats):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    # Without its head, whose logits would hide what is kept beside the layers; score_layers against the whole of it.
    measured = {name: partial(forward, model.model, names) for name, names in runs.items()}
    memory = {name: peak_megabytes(run) for name, run in measured.items()}
    memory = {name: peak - memory[PLAIN] for name, peak in memory.items()}
    memory["score_layers"] = peak_megabytes(scores) - peak_megabytes(timed[PLAIN])
    plain = seconds[PLAIN]
    print(f"4 x 512 tokens, {arguments.threads} threads, torch {torch.__version__}, {arguments.repeats} rounds")
    for name, times in seconds.items():
        ratio = median(t / p for t, p in zip(times, plain, strict=True)) - 1
        print(f"{name:28s} {median(times):7.3f} s   {ratio:+7.2%}   {memory[name]:+7.1f} MB")
    print(f"every score of activations: {', '.join(runs['every score of activations'])}")


if __name__ == "__main__":
    main()

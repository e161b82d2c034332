"""The distillation loss and its gradient, against the same written with PyTorch's own functions.

    python tests/benchmarks/distillation_cost.py

Seconds by turns in one process, medians of five; the memory is the most that the process held, each in one of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hf_layerprobe.repair.distillation import distillation_loss

WEIGHT = 0.5


def usual(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    student, teacher = student.float(), teacher.float()
    distance = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="batchmean")
    return distance + WEIGHT * cross_entropy(student, labels)


def ours(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return distillation_loss(student, teacher, labels=labels, text_weight=WEIGHT)


LOSSES = {"usual": usual, "ours": ours}


def seconds(name: str, student: torch.Tensor, *others: torch.Tensor) -> float:
    student.grad = None
    started = time.perf_counter()
    LOSSES[name](student, *others).backward()
    return time.perf_counter() - started


def peak() -> int:
    """The most kilobytes that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=960)
    parser.add_argument("--classes", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=LOSSES, help="once, and print the memory")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    student, teacher = (torch.randn(asked.rows, asked.classes, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    tensors = student, teacher, torch.randint(asked.classes, (asked.rows,))
    before = peak()
    if asked.only:
        seconds(asked.only, *tensors)
        print((peak() - before) / 1024)
        return
    found = {name: [] for name in LOSSES}
    for _ in range(5):
        for name, times in found.items():
            times.append(seconds(name, *tensors))
    for name, times in found.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:6} {median(times):.3f} s  {memory:.0f} MB")
    ratio = median(u / o for u, o in zip(found["usual"], found["ours"], strict=True))
    print(f"{asked.rows} x {asked.classes}, bfloat16, {asked.threads} threads: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()

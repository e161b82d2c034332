"""Runs the trials of many types in several processes, one thread each."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

TYPES_AT_A_TIME = 220  # then new processes: compiled code and caches of hundreds of models add up


def run(types: list[str], processes: int, trial: Callable[[str], Any], journal: Path | None = None) -> dict[str, Any]:
    """Type → what became of it.

    Args:
        types: Model types.
        processes: How many at once.
        trial: What is done with each type; a function of a module.
        journal: A file that each result is added to at once; those that are in it already are not tried again.
    """
    context = multiprocessing.get_context("spawn")
    start = time.monotonic()
    lines = journal.read_text(encoding="utf-8").splitlines() if journal and journal.exists() else []
    found: dict[str, Any] = dict(map(json.loads, lines))
    left = [name for name in types if name not in found]
    # Not by `max_tasks_per_child`: an executor may wait forever for a process that it did not replace (CPython 3.11).
    with tqdm(total=len(left), mininterval=10, disable=len(left) < 20) as progress:
        for first in range(0, len(left), TYPES_AT_A_TIME):
            with ProcessPoolExecutor(processes, context, _start) as pool:
                jobs = {pool.submit(trial, name): name for name in left[first : first + TYPES_AT_A_TIME]}
                for job in as_completed(jobs):
                    name = jobs[job]
                    found[name] = job.result()
                    progress.update()
                    if journal:
                        with journal.open("a", encoding="utf-8") as file:
                            file.write(json.dumps([name, found[name]]) + "\n")
    print(f"{len(left)} types in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return {name: found[name] for name in types}


def _start() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

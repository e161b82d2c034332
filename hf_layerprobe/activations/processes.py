"""Data that several processes share, and adding up what each of them has seen of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.data_loader import DataLoaderAdapter
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

T = TypeVar("T")


def is_share(data: Any) -> bool:
    """Whether this is one process's share of the data: a loader that `accelerate` has prepared, or a distributed sampler's."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    prepared = isinstance(data, DataLoaderAdapter)
    return prepared or (isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler))


def own_rows(loader: Any) -> Iterator[Any]:
    """The batches of a share, without the rows that `accelerate` repeats so that the processes have equally many."""
    rank = distributed.get_rank()
    for batch in loader:
        real = getattr(loader, "remainder", -1) if getattr(loader, "end_of_dataloader", False) else -1
        if real > 0:  # of the last batches of all processes together, in their order
            length = len(next(iter(batch.values())))
            batch = {name: values[: max(0, real - rank * length)] for name, values in batch.items()}
            if real <= rank * length:
                return
        yield batch


def add_up(accumulators: Sequence[Any]) -> None:
    """Makes every process's accumulators hold what those of all processes have seen.

    All processes of the default group have to call it, with accumulators built in the same way.
    """
    everyone = _gathered([accumulator.state_dict() for accumulator in accumulators])
    for accumulator, first, *others in zip(accumulators, *everyone, strict=True):
        accumulator.load_state_dict(first)
        for state in others:
            other = copy.deepcopy(accumulator)
            other.load_state_dict(state)
            accumulator.merge(other)


def sum_of_all(value: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' values, of one shape; written into `value`. All processes of the default group have to call it."""
    distributed.all_reduce(value)
    return value


def of_first(mine: T) -> T:
    """What the first process has, in all of them; all processes of the default group have to call it."""
    found = [mine]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def joined(fingerprint: str) -> str:
    """The fingerprint of the data of all processes, in their order."""
    return hashlib.sha256("".join(_gathered(fingerprint)).encode()).hexdigest()


def _gathered(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return everyone

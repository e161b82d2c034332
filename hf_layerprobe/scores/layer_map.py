"""`docs`: layer × layer (or expert × expert) maps of every kind of matrix, of one model or of two.

The work is cut into blocks, one row of one map each: a block is computed the same way whoever computes it, so that
processes can share the blocks out and a run that was killed can go on, to the identical result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..errors import LayerProbeError
from ..progress import progress
from ..stacks import LayerStack
from ..weights import KINDS
from .block_store import BlockStore
from .docs import SOURCE, chance_level, check_axis, docs_index
from .indices import INDICES, Features
from .matching import best_matches, products_per_second
from .similarity import SimilarityMatrix
from .units import Side
from .vectors import Vectors

logger = logging.get_logger(__name__)
# Numbers in the matrices that are compared in one call.
TOGETHER = 1 << 25


@dataclass(frozen=True)
class Block:
    """One row of one map: a unit of the first model against units of the second."""

    kind: str
    row: int
    columns: tuple[int, ...]
    cost: int  # multiplications

    @property
    def key(self) -> str:
        return f"{self.kind} {self.row}"


def docs(
    model: nn.Module | str | Path,
    *,
    kinds: Sequence[str] | None = None,
    axis: str = "out",
    stack: str | LayerStack | None = None,
    other: nn.Module | str | Path | None = None,
    index: str = "docs",
    layers: Sequence[int] | None = None,
    experts: bool = False,
    sample: int | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
) -> SimilarityMatrix:
    """Layer × layer similarity for every kind of weight matrix: DOCS (arXiv 2501.16650) or one of its rivals.

    Under `torchrun` or `accelerate launch` the work is shared out by cost, and every process returns the whole result.

    Args:
        model: A model, of which only weights are read; or a folder or Hub id with safetensors, which are read matrix by
            matrix without building the model.
        kinds: Some of q, k, v, o, gate, up, down; all that the model has and that can be read by default.
        axis: `"out"` or `"in"`; see [`docs_similarity`].
        stack: Path of the stack, in both models; the main one of each by default.
        other: A second model or checkpoint (a tuned one, say); its layers are then the columns. Kinds that one of the two
            lacks are left out, with a line in `notes`.
        index: `"docs"`, or a rival that the paper compares with: regression, cca, svcca, pwcca, hsic, cka, cka-debiased.
        layers: Some layers only (0-based).
        experts: Compare the experts of MoE layers one by one instead of each layer's experts as one wide MLP.
        sample: Match at most this many random vectors of each matrix (against all of the other); the result then has the
            standard error of each value. Only for `"docs"`.
        seed: Of the sample.
        resume: A folder for finished rows: a run with the same weights and arguments goes on from there.

    Returns:
        One matrix a kind, with the chance level of its shapes (for `"docs"`). Gaps are NaN, and each has a line in
        `notes`: a layer of either model that lacks the kind or has only zeros, or two whose vectors have different lengths.
        So has a kind that is left out because it cannot be read.

    Raises:
        LayerProbeError: No stack, an unknown kind, axis, index or layer, no kind that both models have, weights that are
            not in memory or not finite, or a `resume` folder of another run.
    """
    check_axis(axis)
    if index != "docs" and index not in INDICES:
        raise LayerProbeError(f"Unknown index {index!r}; the indices are docs, {', '.join(INDICES)}.")
    if sample is not None and (index != "docs" or sample < 2):
        raise LayerProbeError(
            f"sample is a number of vectors, at least 2, for index='docs'; got {sample} for {index!r}."
        )
    here = Side(model, stack, kinds, layers, experts, axis)
    path = None if stack is None else here.stack.path  # by default the main one of each, whatever it is called there
    there = here if other is None else Side(other, path, kinds, layers, experts, axis)
    symmetric = other is None and (index == "docs" or INDICES[index].symmetric)
    itself = 1.0 if index == "docs" else INDICES[index].self_value
    known = other is None and itself is not None  # a matrix with itself need not be computed
    options = {"axis": axis, "index": index, "sample": sample, "seed": seed, "symmetric": symmetric}
    notes = list(dict.fromkeys((*here.weights.notes, *there.weights.notes)))
    notes += _one_sided(here, there)
    blocks = _blocks(here, there, symmetric, known, sample, notes)
    store = BlockStore(resume, _run_id(here, there, options)) if resume is not None else None
    rows = store.load() if store is not None else {}
    # All blocks are shared out, not only those left: a process that starts late finds rows that others have saved by
    # then, and all must still agree on who does what.
    todo = [block for block in _mine(blocks) if block.key not in rows]
    title = _announce(todo, index, here)
    second = lru_cache(maxsize=there.cached())(lambda kind, unit: there.load(kind, unit, index))
    first = second if there is here else lru_cache(maxsize=1)(lambda kind, unit: here.load(kind, unit, index))
    found = {}
    with progress(desc=title, total=2 * sum(block.cost for block in todo), unit="FLOP") as bar:
        for block in todo:
            partners = (second(block.kind, there.units[block.kind][column]) for column in block.columns)
            unit = here.units[block.kind][block.row]
            found[block.key] = _compare(first(block.kind, unit), partners, index, sample, seed)
            if store is not None:
                store.save(block.key, found[block.key])
            bar.update(2 * block.cost)
    rows |= _gathered(found)
    return _assemble(here, there, blocks, rows, options, itself if known else None, notes)


def _announce(todo: list[Block], index: str, here: Side) -> str:
    """Logs what is ahead; the title of the progress bar, with the time that it will take where that can be said."""
    pairs, operations = sum(len(block.columns) for block in todo), 2 * sum(block.cost for block in todo)
    text = f"{index}: {pairs} pairs of matrices"
    title = index.upper()
    if index == "docs":  # its rivals do other things than products
        text += f", {operations * 1e-12:.3g} TFLOP of products"
        if operations and here.device.type == "cpu":
            rate = products_per_second(torch.get_num_threads())
            title += f" (about {tqdm.format_interval(operations / rate)})"
            text += f", about {operations / rate:.3g} s at {rate * 1e-12:.2g} TFLOP/s on this process's threads"
    logger.info(text)
    return title


def _blocks(here: Side, there: Side, symmetric: bool, known: bool, sample: int | None, notes: list[str]) -> list[Block]:
    """The rows to compute; what cannot be compared is left out and noted."""
    blocks = []
    for kind in here.units:
        for row, unit in enumerate(here.units[kind]):
            if (kind, unit) not in here.shapes:
                continue
            m, length = here.shapes[kind, unit]
            columns = tuple(
                column
                for column, partner in enumerate(there.units[kind])
                if there.shapes.get((kind, partner), (0, 0))[1] == length
                and not (symmetric and column < row)
                and not (known and column == row)
            )
            sizes = [there.shapes[kind, there.units[kind][j]][0] for j in columns]
            if sample is None:
                cost = sum(m * p * length for p in sizes)
            else:
                cost = sum((min(sample, m) * p + min(sample, p) * m) * length for p in sizes)
            if columns:
                blocks.append(Block(kind, row, columns, cost))
        notes += _gaps(kind, here, there)
    return blocks


def _one_sided(here: Side, there: Side) -> list[str]:
    """Leaves out the kinds that only one of the two models has; a note on each.

    Raises:
        LayerProbeError: They have none in common.
    """
    mine, theirs = set(here.units), set(there.units)
    if not mine & theirs:
        raise LayerProbeError(
            f"The two models have no kind of matrix in common: the first has {', '.join(here.units)}, the second "
            f"{', '.join(there.units)}. Compare two models whose layers are alike."
        )
    notes = []
    for kind in (kind for kind in KINDS if kind in mine ^ theirs):
        side, whose = (here, "first") if kind in mine else (there, "second")
        del side.units[kind]
        notes.append(f"{kind}: only the {whose} model has such matrices")
    return notes


def _gaps(kind: str, here: Side, there: Side) -> list[str]:
    """Why entries of the map of one kind are missing."""
    sides = {"": here} if there is here else {" of the first model": here, " of the second model": there}
    notes, lengths = [], {}
    for whose, side in sides.items():
        for unit in side.units[kind]:
            if (kind, unit) in side.shapes:
                length = side.shapes[kind, unit][1]
                lengths.setdefault(length, {}).setdefault(whose, []).append(str(unit))
        lacking = [unit.layer for unit in side.units[kind] if (kind, unit) not in side.shapes]
        if lacking:
            notes.append(f"{kind}: layers {lacking}{whose} have no such matrix")
    if len(lengths) > 1:
        groups = "; ".join(
            f"{', '.join(units)}{whose} ({length})" for length, of in lengths.items() for whose, units in of.items()
        )
        notes.append(f"{kind}: vectors of several lengths, compared within groups only: {groups}")
    return notes


def _compare(
    row: Vectors | Features, partners: Iterable[Vectors | Features], index: str, sample: int | None, seed: int
) -> list[list[float]]:
    """[value, standard error] against each partner; a pair without vectors is NaN."""
    if index != "docs":
        return [[float(INDICES[index].function(row, other)), 0.0] for other in partners]
    matches: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    shares = []
    for group in _groups(partners):
        usable = [other for other in group if len(row) and len(other)]
        if sample is None:
            found = best_matches(row, usable) if usable else []
        else:
            some = _some(row, sample, seed)
            few = [_some(other, sample, seed) for other in usable]
            found = [
                (best_matches(some, [other])[0][0], best_matches(part, [row])[0][0])
                for other, part in zip(usable, few, strict=True)
            ]
            # Sampling without replacement: no error is left when all vectors are in the sample.
            sizes = zip(usable, few, strict=True)
            shares += [1 - min(len(some) / len(row), len(part) / len(other)) for other, part in sizes]
        ready = iter(found)
        matches += [next(ready) if len(row) and len(other) else None for other in group]
        del group, usable  # before the next matrix is read
    values = iter(docs_index([pair for pair in matches if pair is not None]))
    results = [[float("nan"), float("nan")] if pair is None else list(next(values)) for pair in matches]
    if sample is not None:
        finite = iter(shares)
        results = [[v, e if v != v else e * next(finite) ** 0.5] for v, e in results]
    return results


def _groups(partners: Iterable[Vectors]) -> Iterator[list[Vectors]]:
    """Matrices that are compared in one call: many small ones, or a single large one."""
    group: list[Vectors] = []
    size = 0
    for other in partners:
        group.append(other)
        size += len(other) * other.length
        del other
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _some(vectors: Vectors, number: int, seed: int) -> Vectors:
    if number >= len(vectors):
        return vectors
    return vectors.take(torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:number])


def _rank() -> tuple[int, int]:
    """(this process, number of processes)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _mine(blocks: list[Block]) -> list[Block]:
    """This process's share: the costliest blocks first, each to whoever has least; then in map order."""
    rank, world = _rank()
    load, mine = [0] * world, []
    for block in sorted(blocks, key=lambda block: -block.cost):
        to = load.index(min(load))
        load[to] += block.cost
        if to == rank:
            mine.append(block)
    return sorted(mine, key=lambda block: (KINDS.index(block.kind), block.row))


def _gathered(found: dict[str, list]) -> dict[str, list]:
    world = _rank()[1]
    if world == 1:
        return found
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, found)
    return {key: row for part in everyone for key, row in part.items()}


def _run_id(here: Side, there: Side, options: dict[str, Any]) -> str:
    content = [options, here.weights.fingerprint(), there.weights.fingerprint()]
    content.append({kind: [str(unit) for unit in units] for kind, units in here.units.items()})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _assemble(here, there, blocks, rows, options, itself: float | None, notes) -> SimilarityMatrix:
    values, errors, chance = {}, {}, {}
    index, symmetric = options["index"], options["symmetric"]
    for kind, units in here.units.items():
        values[kind] = np.full((len(units), len(there.units[kind])), np.nan)
        errors[kind] = np.full_like(values[kind], np.nan)
        if itself is not None:
            present = [position for position, unit in enumerate(units) if (kind, unit) in here.shapes]
            values[kind][present, present], errors[kind][present, present] = itself, 0  # by definition
        shapes = [[side.shapes.get((kind, unit)) for unit in side.units[kind]] for side in (here, there)]
        chance[kind] = _chance(*shapes) if index == "docs" else np.nan
    for block in blocks:
        for column, (value, error) in zip(block.columns, rows[block.key], strict=True):
            values[block.kind][block.row, column], errors[block.kind][block.row, column] = value, error
            if symmetric:
                values[block.kind][column, block.row], errors[block.kind][column, block.row] = value, error
            if value != value:
                pair = f"{here.units[block.kind][block.row]} and {there.units[block.kind][column]}"
                notes.append(f"{block.kind}: {pair} are not compared, one has no vector that is not zero")
    for note in notes:
        logger.warning(note)
    return SimilarityMatrix(
        values=values,
        chance=chance,
        axis=options["axis"],
        stack=here.stack.path,
        source=SOURCE if index == "docs" else INDICES[index].source,
        index=index,
        rows={kind: [str(unit) for unit in units] for kind, units in here.units.items()},
        columns={kind: [str(unit) for unit in there.units[kind]] for kind in here.units},
        standard_error=errors if options["sample"] is not None else {},
        notes=tuple(notes),
    )


def _chance(rows: list[tuple[int, int] | None], columns: list[tuple[int, int] | None]) -> float | np.ndarray:
    shapes = {*rows, *columns} - {None}
    if len(shapes) == 1:
        vectors, length = shapes.pop()
        return chance_level(vectors, vectors, length)
    levels = np.full((len(rows), len(columns)), np.nan)
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            if x and y and x[1] == y[1]:
                levels[i, j] = chance_level(x[0], y[0], x[1])
    return levels

"""Ways to a good set of layers, all by measuring: one block, one layer at a time, several at a time, by swaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf, isfinite
from typing import Any

from ..errors import LayerProbeError, PruningError
from ..stacks.admissible import least_worth
from .losses import Removed, SetLosses

# Beam: sets kept in each round. After the first, so many layers are tried with each, those that cost least when last tried.
WIDTH = 3
TRIED = 12
# Blocks: so many are measured in full, those that cost least on so many tokens.
BLOCKS, LOOK_TOKENS = 6, 256

Admissible = Callable[[Removed], bool]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        removed: The set of layers.
        path: The best set of each size that it met on its way and that can go, with its loss; empty for searches that meet
            none. Where none of a size can go, the size is left out.
    """

    removed: Removed
    path: list[dict[str, Any]] = field(default_factory=list)


def contiguous(losses: SetLosses, number: int, admissible: Admissible) -> Found:
    """The block of neighbouring layers that costs least (as in arXiv 2403.17887, but by the loss itself).

    A first look at a few tokens tells which blocks are worth measuring on all.

    Raises:
        PruningError: No block can go.
    """
    total = losses.stack.num_layers
    blocks = [tuple(range(first, first + number)) for first in range(total - number + 1)]
    blocks = [block for block in blocks if admissible(block)]
    if len(blocks) > BLOCKS:
        look = losses.first_look(LOOK_TOKENS).measure(blocks, desc="First look at blocks")
        blocks = sorted(look, key=look.get)[:BLOCKS] or blocks
    return Found(_best(losses, blocks, number, "Blocks"))


def greedy(losses: SetLosses, number: int, admissible: Admissible) -> Found:
    """One layer after the other, each time the one whose removal costs least (SLEB, arXiv 2402.09025).

    Unlike there, the first and the last layer may go, and after the first round only the layers that cost least when they
    were last tried are.

    Raises:
        PruningError: No set can go.
        LayerProbeError: No time for all rounds, or no set with a finite loss.
    """
    return beam(losses, number, admissible, width=1)


def beam(losses: SetLosses, number: int, admissible: Admissible, *, width: int = WIDTH) -> Found:
    """Greedy removal that carries on with several sets at a time (our own definition).

    Raises:
        PruningError: No set can go.
    """
    total = losses.stack.num_layers
    sets: list[Removed] = [()]
    path = [_entry((), losses.measure([()], desc="No layer removed"))]
    cost = dict.fromkeys(range(total), 0.0)  # what each layer added to the loss when it was last tried
    for size in range(1, number + 1):
        parents: dict[Removed, list[tuple[Removed, int]]] = {}
        for each in sets:
            others = (
                (tuple(sorted((*each, layer))), layer) for layer in sorted(cost, key=cost.get) if layer not in each
            )
            possible = (pair for pair in others if size < number or admissible(pair[0]))
            for candidate, layer in islice(possible, None if size == 1 else TRIED):
                parents.setdefault(candidate, []).append((each, layer))
        if not parents:  # none of these and one more layer can go; a set of what cost least can, or there is none
            start, _ = least_worth(losses.stack, [cost[layer] for layer in range(total)], number)
            best = refine(losses, tuple(start), admissible)
            return Found(best, [*path, _entry(best, losses.known)])
        candidates = list(parents)
        found = losses.measure(candidates, desc=f"{size} of {number} layers")
        if len(found) < len(candidates):
            raise LayerProbeError(
                f"The time was up after {size - 1} of {number} layers were chosen. Give the search more minutes or fewer "
                "tokens, or pass resume= to go on where it stopped."
            )
        added: dict[int, float] = {}
        for candidate, pairs in parents.items():
            for each, layer in pairs:
                added[layer] = min(found[candidate] - losses.known[each], added.get(layer, inf))
        cost.update(added)
        finite = sorted((each for each in found if isfinite(found[each])), key=found.get)
        if not finite:
            raise _not_finite(losses, number)
        sets = finite[:width]
        path += [_entry(each, found) for each in islice(filter(admissible, finite), 1)]
    return Found(sets[0], path)


def refine(losses: SetLosses, removed: Removed, admissible: Admissible) -> Removed:
    """Swaps a removed layer for a neighbour or for one of the layers next to the set, as long as that helps.

    Stops when no swap helps or the time is up.
    """
    best = removed
    losses.measure([best])
    while not losses.out_of_time:
        found = losses.measure(
            [each for each in _swaps(best, losses.stack.num_layers) if admissible(each)], desc="Swaps"
        )
        better = min(found, key=found.get, default=best)
        if not found or found[better] >= losses.known[best]:
            break
        best = better
    return best


def _swaps(removed: Removed, total: int) -> Iterable[Removed]:
    beside = {near for layer in removed for near in (layer - 1, layer + 1) if 0 <= near < total} - set(removed)
    return {tuple(sorted({*removed, new} - {old})) for old in removed for new in beside}


def _entry(removed: Removed, found: dict[Removed, float]) -> dict[str, Any]:
    if removed not in found:
        raise LayerProbeError("The time was up before anything was measured. Give the search more minutes.")
    return {"remove": list(removed), "loss": found[removed]}


def _best(losses: SetLosses, sets: Sequence[Removed], number: int, desc: str) -> Removed:
    if not sets:
        raise _none(losses, number)
    found = losses.measure(sets, desc=desc)
    if not found:
        raise LayerProbeError("The time was up before one set was measured. Give the search more minutes.")
    best = min(found, key=found.get)
    if not isfinite(found[best]):
        raise _not_finite(losses, number)
    return best


def _not_finite(losses: SetLosses, number: int) -> LayerProbeError:
    return LayerProbeError(
        f"The loss without any {number} layers of {losses.stack.path!r} that were tried is not finite. Run the model in "
        "float32 or bfloat16, or remove fewer layers."
    )


def _none(losses: SetLosses, number: int) -> PruningError:
    return PruningError(f"No {number} layers of {losses.stack.path!r} that were tried can go together.")


RULES: dict[str, Callable[[SetLosses, int, Admissible], Found]] = {
    "contiguous": contiguous,
    "greedy": greedy,
    "beam": beam,
}

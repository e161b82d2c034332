"""Which layers can go: the check of one kept set, and the search for the best set that passes it."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import PruningError
from .edit import StackEdit, edit_stacks
from .refusal import Refusal
from .rules import check_lengths, check_towers

if TYPE_CHECKING:
    from .find import LayerStack

# Each round is a model on the meta device, some hundredths of a second.
ROUNDS = 12


def check(stack: LayerStack, keep: Iterable[int]) -> None:
    """See [`LayerStack.check`]."""
    expressible({stack: _valid(stack, keep)})


def expressible(stacks: Mapping[LayerStack, Sequence[int]]) -> StackEdit:
    """The edit that leaves only these layers of each stack.

    Raises:
        PruningError: The architecture cannot express it; with the reason and the nearest sets of that stack that work.
    """
    check_towers({stack.path: keep for stack, keep in stacks.items()}, next(iter(stacks)).model)
    try:
        edit = edit_stacks(stacks)
    except Refusal as refusal:
        for stack, keep in stacks.items():
            if len(stacks) == 1 or _refusal(stack, keep):
                raise _explained(stack, keep, _refusal(stack, keep)) from refusal
        parts = ", ".join(f"{list(keep)} of {stack.path!r}" for stack, keep in stacks.items())
        raise PruningError(f"Keeping {parts} works for each alone, not together: {refusal}") from refusal
    check_lengths(next(iter(stacks)).model.config, edit.model.config)
    return edit


def least_worth(stack: LayerStack, worth: Sequence[float], number: int) -> tuple[list[int], str]:
    """The layers to remove whose worth is smallest, among the sets that the model can express.

    Args:
        stack: The stack.
        worth: One number a layer; high is worth keeping.
        number: Layers to remove.

    Returns:
        Their indices, ascending, and why they are not simply the `number` lowest ones; an empty text where they are.

    Raises:
        PruningError: No set of that size was found.
    """
    lowest = sorted(sorted(range(len(worth)), key=lambda i: worth[i])[:number])
    keep = [i for i in range(len(worth)) if i not in lowest]
    refusal = _refusal(stack, keep)
    if refusal is None:
        return lowest, ""
    chosen = _choose(stack, worth, number)
    if chosen is None:
        raise _explained(stack, keep, refusal)
    return chosen, f"layers {lowest} are worth least, but cannot go together: {refusal.reason}"


def first_admissible(stack: LayerStack, proposals: Sequence[Sequence[int]]) -> tuple[list[int], str]:
    """The first of several sets of layers to remove that the model can express.

    Args:
        stack: The stack.
        proposals: The sets, the best first.

    Returns:
        Its indices, ascending, and why it is not the first one; an empty text where it is.

    Raises:
        PruningError: The model can express none of them; the message is about the first.
    """
    first = None
    for removed in proposals:
        keep = [i for i in range(stack.num_layers) if i not in removed]
        refusal = _refusal(stack, keep)
        if refusal is None:
            return list(removed), f"layers {list(proposals[0])} cannot go together: {first[1].reason}" if first else ""
        first = first or (keep, refusal)
    raise _explained(stack, *first)


def can_go(stack: LayerStack, removed: Sequence[int]) -> bool:
    """Whether the model can be built without these layers."""
    return _refusal(stack, [i for i in range(stack.num_layers) if i not in removed]) is None


def _refusal(stack: LayerStack, keep: Sequence[int]) -> Refusal | None:
    try:
        edit_stacks({stack: keep})
    except Refusal as refusal:
        return refusal
    return None


def _explained(stack: LayerStack, keep: Sequence[int], refusal: Refusal) -> PruningError:
    """The error that a caller gets: which layers, why not, and which sets would do."""
    removed = [i for i in range(stack.num_layers) if i not in keep]
    nearest = _nearest(stack, keep)
    others = [[i for i in range(stack.num_layers) if i not in each] for each in nearest]
    if others:
        advice = f"Nearest sets that work: remove {', or '.join(str(each) for each in others)}"
    else:
        advice = "No set near this one was found that works"
    return PruningError(
        f"{type(stack.model).__name__} cannot lose layers {removed} of {stack.path!r} (keeping {list(keep)}): "
        f"{refusal.reason}. {advice}.",
        nearest=nearest,
    )


def _nearest(stack: LayerStack, keep: Sequence[int]) -> list[tuple[int, ...]]:
    """Kept sets that can be expressed: the one most like the given one of the same size, one layer more, and one fewer."""
    total, found = stack.num_layers, []
    removed = [i for i in range(total) if i not in keep]
    # A layer that was to go is worth nothing; of the others, those beside one cost a little less than those far away.
    worth = [0.0 if i in removed else 1 + min(abs(i - r) for r in removed) / total**2 for i in range(total)]
    for number in (len(removed), len(removed) - 1, len(removed) + 1):
        if 0 < number < total and (chosen := _choose(stack, worth, number)) is not None:
            found.append(tuple(i for i in range(total) if i not in chosen))
    return found


def _choose(stack: LayerStack, worth: Sequence[float], number: int) -> list[int] | None:
    """The layers to remove whose worth is smallest, among the sets that can be expressed; None where none was found.

    Each refusal of the best set left says which layers must stay, or what has to stand at a position; the next best set
    respects that, until one passes. Where the config could hold another rule of positions (`periods`), the search goes by
    the present one.
    """
    needs: list[frozenset[int]] = []
    rules: list[tuple[Sequence[Hashable], Sequence[Hashable]]] = []
    for _ in range(ROUNDS):
        keep = _best_kept(worth, stack.num_layers - number, needs, rules)
        if keep is None:
            return None
        refusal = _refusal(stack, keep)
        if refusal is None:
            return [i for i in range(stack.num_layers) if i not in keep]
        if refusal.kinds is not None:
            rules.append((refusal.kinds, refusal.wanted))
        else:
            needs += refusal.needs or _blamed(stack, keep)
    return None


def _blamed(stack: LayerStack, keep: Sequence[int]) -> list[frozenset[int]]:
    """What a refusal that names no layers needs: those that cannot even go alone; else one of those that go."""
    removed = [i for i in range(stack.num_layers) if i not in keep]
    alone = [frozenset([i]) for i in removed if _refusal(stack, [j for j in range(stack.num_layers) if j != i])]
    return alone or [frozenset(removed)]


def _best_kept(worth, size, needs, rules) -> list[int] | None:
    """The kept set of a size with the largest worth, of those with the right kind at every position and what is needed.

    A needed layer is one; of several, the one that is worth most (the exact choice would be a search of its own).
    """
    total = len(worth)
    must = {max(layers, key=lambda i: worth[i]) for layers in needs}
    # best[i]: (worth, kept) of the best choice of j layers among the first i, for growing j.
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())]
    for i in range(total):
        best.append(best[i] if best[i] is not None and i not in must else None)
    for j in range(size):
        row: list[tuple[float, tuple[int, ...]] | None] = [None]
        for i in range(total):
            skipped = row[i] if i not in must else None
            fits = best[i] is not None and all(wanted[j] == kinds[i] for kinds, wanted in rules)
            taken = (best[i][0] + worth[i], (*best[i][1], i)) if fits else None
            row.append(max((each for each in (skipped, taken) if each), key=lambda each: each[0], default=None))
        best = row
    return list(best[total][1]) if best[total] else None


def _valid(stack: LayerStack, keep: Iterable[int]) -> list[int]:
    try:
        indices = sorted(operator.index(i) for i in keep)
    except TypeError:
        raise PruningError(f"keep is a list of layers (0-based), such as [0, 2]; got {keep!r}.") from None
    if not indices or len(set(indices)) < len(indices) or not 0 <= indices[0] <= indices[-1] < stack.num_layers:
        raise PruningError(
            f"keep names at least one layer of {stack.path!r}, each once, from 0 to {stack.num_layers - 1}; got {indices}."
        )
    return indices

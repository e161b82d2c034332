"""Why a kept set cannot be expressed, in words and in the form that the search for the nearest sets needs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from ..errors import PruningError


class Refusal(PruningError):  # noqa: N818 - it is why, not what went wrong
    """A kept set that a model cannot express.

    Attributes:
        reason: In words, without a full stop.
        needs: Sets of layers of which at least one has to stay each.
        kinds: What each layer of the original is, for rules that give every position a kind; None for other reasons.
        wanted: What the layer at each position of the pruned model has to be.
    """

    def __init__(
        self,
        reason: str,
        *,
        needs: Iterable[Iterable[int]] = (),
        kinds: Sequence[Hashable] | None = None,
        wanted: Sequence[Hashable] | None = None,
    ):
        super().__init__(f"{reason}.")
        self.reason = reason
        self.needs = tuple(frozenset(layers) for layers in needs)
        self.kinds, self.wanted = kinds, wanted

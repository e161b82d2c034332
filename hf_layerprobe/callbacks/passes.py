"""Scores of activations from the forward passes that a Trainer makes anyway."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.state import GradientState
from torch import distributed, nn
from torch.utils.data import DataLoader

from ..activations import LayerStream
from ..activations.processes import add_up
from ..activations.run import TokenCount
from ..scores import LayerScores
from ..scores.registry import Score
from ..stacks import LayerStack


class Passes:
    """Takes the passes of an evaluation, or of a training step.

    A pass counts once the Trainer reports its batch. Of several evaluation passes before that (text generated for a
    metric) only the last one counts, which is the one that gives the loss.

    Args:
        stack: The layers to watch.
        scores: Name → a score of activations.
    """

    def __init__(self, stack: LayerStack, scores: Mapping[str, Score]):
        self.stack = stack
        self.scores = scores
        self.reset()
        self._stream = LayerStream(stack, [self], guest=True)

    @property
    def sites(self) -> tuple[str, ...]:
        """The activations inside layers that the scores ask for."""
        return tuple(site for accumulator in self._counted.values() for site in getattr(accumulator, "sites", ()))

    def reset(self) -> None:
        # Scores that read the same statistics share them.
        made = {score.make: score.make(self.stack.num_layers) for score in self.scores.values()}
        self._counted = {TokenCount: TokenCount(), **made}
        self._latest: dict[str, Any] | None = None  # `_counted` and the latest pass
        self.seen = self.missed = 0
        self._loader: DataLoader | None = None

    @contextmanager
    def open(self, *, training: bool, compiled: bool = False) -> Iterator[None]:
        """Within the context, passes in that mode are taken; hooks are there for no longer.

        Compiled graphs know no hooks that come later: they rest meanwhile, as they are, and modules run uncompiled.

        Args:
            training: Which mode.
            compiled: Whether something around the model is compiled; what is in it is found.
        """
        self._stream.training = training
        compiled = compiled or any(map(_is_compiled, self.stack.model.modules()))
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), self._stream:
            yield

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None, **sites: torch.Tensor
    ) -> None:
        if layer == 0 or self._latest is None:
            self._latest = copy.deepcopy(self._counted)  # a few numbers a layer
        mask = _without_repeated(before, mask)
        for accumulator in self._latest.values():
            wanted = {site: sites[site] for site in getattr(accumulator, "sites", ())}
            accumulator.update(layer, before, after, mask, **wanted)

    def count(self, loader: DataLoader | None = None) -> None:
        """Takes the latest pass as a batch (of the evaluation over this loader)."""
        if self._loader not in (None, loader):
            self.reset()  # the evaluation before broke off
        self._loader = loader
        if self._latest is None:
            self.missed += 1
        else:
            self._counted, self._latest = self._latest, None
            self.seen += 1

    def add_up(self) -> None:
        """Adds what the other processes have counted; all of them have to call it, before `values`."""
        if not _processes():
            return
        counts: list[Any] = [None] * _processes()
        distributed.all_gather_object(counts, (self.seen, self.missed))
        self.seen, self.missed = (sum(each) for each in zip(*counts, strict=True))
        add_up(list(self._counted.values()))

    def result(self, name: str) -> LayerScores:
        """A score of what has been counted, by all processes together.

        Raises:
            LayerProbeError: It cannot be had of these layers, or of so few tokens.
        """
        score = self.scores[name]
        values, details = score.read(self._counted[score.make])
        used = {"tokens": int(self._counted[TokenCount].tokens.value), "batches": self.seen}
        return LayerScores(
            score.name, values, score.higher_is_more_important, self.stack.path, score.source, details, used
        )


def around(owner: Any, name: str, context: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Puts a context around every call of one object's method, so that what it opens is closed also on Ctrl-C.

    A Trainer's events do not say that an evaluation is about to begin, nor that it, or a training step, broke off.

    Args:
        owner: The object; gets an attribute of the method's name.
        name: The method.
        context: A bound method; its object is not kept alive.

    Returns:
        What takes the context off again.
    """
    inner, opener = getattr(owner, name), weakref.WeakMethod(context)

    @functools.wraps(inner)
    def call(*args, **kwargs):
        enter = opener()
        with enter() if enter is not None else nullcontext():
            return inner(*args, **kwargs)

    def undo() -> None:
        if vars(owner).get(name) is call:
            delattr(owner, name) if getattr(inner, "__self__", None) is owner else setattr(owner, name, inner)

    setattr(owner, name, call)
    return undo


def _processes() -> int:
    """How many there are, if there are several."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    world = distributed.get_world_size()
    return world if world > 1 else 0


def _without_repeated(before: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask without the rows that accelerate repeats in the last batches, so that all processes have equally many."""
    loader = GradientState().active_dataloader if _processes() else None
    if loader is None or not loader.end_of_dataloader or loader.remainder <= 0:
        return mask
    # Of the last batches of all processes, one below the other, the first `remainder` rows are those of the data.
    rows = len(before)
    own = min(max(loader.remainder - distributed.get_rank() * rows, 0), rows)
    if own == rows:
        return mask
    mask = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device) if mask is None else mask.clone()
    mask[own:] = False
    return mask


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"

"""The loss of a model without any set of its layers, each set measured once, and only from where it differs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..activations.fingerprint import digest
from ..activations.forward import without_cache
from ..activations.steps import Steps
from ..activations.text import Batch
from ..errors import LayerProbeError
from ..files import write_atomically
from ..modes import evaluating
from ..progress import progress
from ..scores.loss import IGNORED, check_causal, next_tokens, summed_loss
from ..stacks import LayerStack, bypassed

Removed = tuple[int, ...]
# Sets after which a search with a budget looks at the clock, and one that resumes is saved.
AT_A_TIME = 8
# The same kernels on the same numbers; sums over experts may be in another order.
SAME = 1e-3


class SetLosses:
    """Mean next-token losses (nats) of a causal language model with sets of layers removed.

    Sets that are measured together share what they have in common: the stream is carried through the layers one at a
    time, and a set starts where it first differs from the one before it. Where layers cannot be run one at a time, the
    whole model is run for each set.

    Args:
        stack: The stack; its model is left as it was.
        batches: Texts as batches; all are read for each set.
        minutes: Measure no further set after so long.
        resume: A file that keeps the losses, so that a search which was stopped goes on where it was.

    Attributes:
        known: What was measured, by set.

    Raises:
        LayerProbeError: Not a causal language model, no text with two tokens, a budget that is not positive, or a file of
            another model or text.
    """

    def __init__(
        self,
        stack: LayerStack,
        batches: Sequence[Batch],
        *,
        minutes: float | None = None,
        resume: str | Path | None = None,
    ):
        if minutes is not None and not (isinstance(minutes, Real) and minutes > 0):
            raise LayerProbeError(f"minutes is how long a search may take; got {minutes!r}.")
        check_causal(stack.model)
        self.stack = stack
        self.batches = batches
        self._fixed = without_cache(stack.model)
        self._stepwise: bool | None = None
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.tokens = sum(int((next_tokens(batch) != IGNORED).sum()) for batch in batches)
        if not self.tokens:
            raise LayerProbeError("No text to measure on has a second token, so there is nothing to predict.")
        self.known: dict[Removed, float] = {}
        self._file = None if resume is None else Path(resume)
        if self._file is not None and self._file.is_dir():
            raise LayerProbeError(f"resume={str(resume)!r} is a folder; name a file in it for the losses.")
        self._about = digest(stack, batches)
        if self._file is not None and self._file.is_file():
            self._load()

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def measure(self, sets: Iterable[Iterable[int]], *, desc: str = "Measuring sets") -> dict[Removed, float]:
        """The losses of these sets, infinite where a sum overflows; of none that is not yet known once the time is up."""
        wanted = {tuple(sorted(each)) for each in sets}
        # Those that agree longest from the first layer on come next to each other.
        depths = range(self.stack.num_layers)
        new = sorted(wanted - self.known.keys(), key=lambda removed: [layer in removed for layer in depths])
        size = len(new) if self.deadline is None and self._file is None else AT_A_TIME
        if new:
            with progress(desc=desc, total=len(new) * len(self.batches), unit="set") as bar:
                for start in range(0, len(new), size):
                    if self.out_of_time:
                        break
                    self._measure(new[start : start + size], bar)
                    self._save()
        return {each: self.known[each] for each in sorted(wanted) if each in self.known}

    def first_look(self, tokens: int) -> SetLosses:
        """The same on the first tokens of the first sequence only, to tell which sets are worth measuring."""
        start = {name: value[:1, :tokens] for name, value in self.batches[0].items()}
        look = SetLosses(self.stack, [start] if (next_tokens(start) != IGNORED).any() else self.batches)
        look.deadline, look._stepwise = self.deadline, self._stepwise
        return look

    def _measure(self, order: Sequence[Removed], bar: tqdm) -> None:
        sums = dict.fromkeys(order, 0.0)
        with evaluating(self.stack.model), torch.no_grad():
            for batch in self.batches:
                labels = next_tokens(batch)
                for removed, logits in (self._stepped if self._by_steps() else self._bypassed)(batch, order):
                    sums[removed] += summed_loss(logits[:, :-1], labels.to(logits.device)).item()
                    bar.update()
        # What overflows is the worst, not unknown.
        means = {removed: loss / self.tokens for removed, loss in sums.items()}
        self.known.update({removed: mean if math.isfinite(mean) else math.inf for removed, mean in means.items()})

    def _stepped(self, batch: Batch, order: Sequence[Removed]) -> Iterator[tuple[Removed, torch.Tensor]]:
        """The logits without each set, from where it differs from the one before."""
        steps, before = Steps(self.stack, batch), None
        streams = [steps.start]  # streams[d]: what enters layer d
        for removed in order:
            if before is not None:
                del streams[min(set(removed) ^ set(before)) + 1 :]
            for depth in range(len(streams) - 1, self.stack.num_layers):
                gone = depth in removed
                streams.append(streams[-1] if gone else steps.run(self.stack.layers[depth], depth, streams[-1]))
            yield removed, steps.finish(streams[-1]).logits
            before = removed

    def _bypassed(self, batch: Batch, order: Sequence[Removed]) -> Iterator[tuple[Removed, torch.Tensor]]:
        """The same with the whole model run for each set."""
        model = self.stack.model
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        for removed in order:
            with bypassed(self.stack, removed):
                yield removed, model(**inputs, **self._fixed).logits

    def _by_steps(self) -> bool:
        """Whether layers can be run one at a time: tried once, on one sequence, without a middle layer."""
        if self._stepwise is None:
            batch = {name: value[:1] for name, value in self.batches[0].items()}
            order = [(), (self.stack.num_layers // 2,)]
            try:
                pairs = zip(self._stepped(batch, order), self._bypassed(batch, order), strict=True)
                self._stepwise = all(
                    (one - other).abs().max() <= SAME * other.abs().max() for (_, one), (_, other) in pairs
                )
            except (LayerProbeError, TypeError, RuntimeError):
                self._stepwise = False
        return self._stepwise

    def _save(self) -> None:
        if self._file is not None:
            losses = [[list(removed), loss] for removed, loss in self.known.items()]
            write_atomically(self._file, json.dumps({"about": self._about, "losses": losses}) + "\n")

    def _load(self) -> None:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            about, losses = content["about"], {tuple(removed): float(loss) for removed, loss in content["losses"]}
        except (ValueError, KeyError, TypeError) as error:
            raise LayerProbeError(
                f"{self._file} holds no losses of a search ({type(error).__name__}: {error})."
            ) from error
        if about != self._about:
            raise LayerProbeError(
                f"{self._file} holds losses of another model, stack or text; name another file, or delete it."
            )
        self.known = losses

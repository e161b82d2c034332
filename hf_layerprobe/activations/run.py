"""The calibration pass: the data once through the model, every accumulator fed on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..errors import LayerProbeError
from ..modes import evaluating
from ..progress import progress
from ..stacks import LayerStack
from .checks import FiniteOutputs, Vocabulary, within_positions
from .data import check_positive
from .fingerprint import Fingerprint
from .forward import one_logit, without_cache
from .processes import add_up, joined
from .state import Resumable, Sum
from .stream import Accumulator, LayerStream
from .text import Batch

logger = logging.get_logger(__name__)


class OwnRuns(Protocol):
    """What is measured by running the model in other ways than once forward."""

    def measure(self, batch: Batch) -> None:
        """Takes one batch of model inputs, on the model's device."""

    def add_up(self) -> None:
        """Takes what all processes have measured on their shares; each of them calls this."""


def run_pass(
    stack: LayerStack,
    accumulators: Sequence[Accumulator],
    data: Iterable[Batch],
    *,
    max_tokens: int | None = None,
    own_runs: Sequence[OwnRuns] = (),
    share: bool = False,
) -> dict[str, Any]:
    """Runs the model over the data in eval mode, without gradients, a cache, and logits that nobody reads.

    Args:
        stack: The layers to watch; its model is run, and its modules are left in the modes they were in.
        accumulators: What to compute.
        data: Batches of model inputs; see [`batches`].
        max_tokens: Stop once this many tokens (padding not counted) have been seen.
        own_runs: Who runs the model in other ways on every batch.
        share: The data are this process's share; all processes call this, and each gets the statistics of all.

    Returns:
        What was used: `tokens` (those of the stack that counted), `sequences`, a `fingerprint` (SHA-256) of the main
        inputs without padding, and the `choices` of [`batches`].

    Raises:
        LayerProbeError: No data or padding alone, token ids that the model does not know, more tokens than it has
            positions, weights that are not in memory, `max_tokens` that is no positive number, padding that cannot be told
            apart in what the layers see, or outputs of layers that are not finite.
    """
    if max_tokens is not None:
        check_positive(max_tokens=max_tokens)
    model = stack.model
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayerProbeError(
            f"{type(model).__name__} has weights on the meta device (offloaded, or built without weights); load it into "
            "memory before computing activation scores."
        )
    fixed = without_cache(model)
    count = TokenCount()
    fingerprint = Fingerprint(model)
    finite, vocabulary = FiniteOutputs(stack.num_layers), Vocabulary(model)
    watching = LayerStream(stack, [count, *accumulators, finite])
    if model.training:
        logger.warning(f"{type(model).__name__} is in training mode; it is measured in evaluation mode and put back.")
    # Compiled graphs know no hooks that come later; within the context modules run uncompiled.
    with torch.compiler.set_stance("force_eager"), evaluating(model), watching as stream, torch.no_grad():
        for index, batch in enumerate(progress(data, desc="Calibration", unit="batch")):
            fingerprint.update(batch)
            vocabulary.check(batch, index)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            with within_positions(model, batch, index):
                model(**inputs, **fixed, **one_logit(model, inputs))
            if own_runs:  # which nobody else may watch
                stream.close()
                for each in own_runs:
                    each.measure(inputs)
                stream.open()
            if max_tokens is not None and count.tokens.value >= max_tokens:
                break
    count.sequences.add(fingerprint.sequences)
    digest = fingerprint.hexdigest()
    if share:
        add_up([count, *accumulators, finite])
        for each in own_runs:
            each.add_up()
        digest = joined(digest)
    if not int(count.sequences.value):
        raise LayerProbeError("The data yielded no batch: it is empty, or every text is.")
    if not int(count.tokens.value):
        raise LayerProbeError(
            f"Every token of the {int(count.sequences.value)} sequences is padding: their masks are 0 everywhere."
        )
    finite.check(stack.path)
    return {
        "tokens": int(count.tokens.value),
        "sequences": int(count.sequences.value),
        "fingerprint": digest,
        **getattr(data, "choices", {}),
    }


class TokenCount(Resumable):
    """How many of a stack's tokens, and how many sequences, have counted."""

    def __init__(self):
        self.tokens, self.sequences = Sum(), Sum()

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        if layer == 0:
            self.tokens.add(before.shape[:2].numel() if mask is None else mask.sum())

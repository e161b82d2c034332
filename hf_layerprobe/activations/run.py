"""The calibration pass: the data once through the model, every accumulator fed on the way."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import LayerProbeError
from ..progress import progress
from ..stacks import LayerStack
from .data import Batch
from .stream import Accumulator, LayerStream


def run_pass(
    stack: LayerStack, accumulators: Sequence[Accumulator], data: Iterable[Batch], *, max_tokens: int | None = None
) -> dict[str, Any]:
    """Runs the model over the data in eval mode, without gradients and without a cache.

    Args:
        stack: The layers to watch; its model is run and left in the mode it was in.
        accumulators: What to compute.
        data: Batches of model inputs; see [`batches`].
        max_tokens: Stop once this many tokens (padding not counted) have been seen.

    Returns:
        What was used: `tokens`, `sequences`, and a `fingerprint` (SHA-256) of the main inputs and masks.

    Raises:
        LayerProbeError: No data, or weights that are not in memory.
    """
    model = stack.model
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LayerProbeError(
            f"{type(model).__name__} has weights on the meta device (offloaded, or built without weights); load it into "
            "memory before computing activation scores."
        )
    accepted = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    seen = {"tokens": 0, "sequences": 0}
    digest = hashlib.sha256()
    training = model.training
    model.eval()
    try:
        with LayerStream(stack, accumulators), torch.no_grad():
            for batch in progress(data, desc="Calibration", unit="batch"):
                main = _main_input(batch, model)
                mask = batch.get("attention_mask")
                for tensor in (main, mask):
                    if tensor is not None:
                        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
                seen["sequences"] += len(main)
                seen["tokens"] += (
                    int(mask.sum()) if mask is not None else main[..., 0].numel() if main.dim() > 2 else main.numel()
                )
                model(**{name: value.to(model.device) for name, value in batch.items()}, **fixed)
                if max_tokens is not None and seen["tokens"] >= max_tokens:
                    break
    finally:
        model.train(training)
    if not seen["sequences"]:
        raise LayerProbeError("The data yielded no batch: it is empty, or every text is.")
    return {**seen, "fingerprint": digest.hexdigest()}


def _main_input(batch: Batch, model: torch.nn.Module) -> torch.Tensor:
    name = getattr(model, "main_input_name", "input_ids")
    if name in batch:
        return batch[name]
    if not batch:
        raise LayerProbeError("A batch holds no tensors; expected a mapping of model inputs (name to tensor).")
    return next(iter(batch.values()))

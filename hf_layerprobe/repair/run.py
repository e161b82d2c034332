"""`repair_model`: runs a repair on a pruned model, and keeps it only if the held-out loss improves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..activations import batches
from ..errors import LayerProbeError
from ..modes import evaluating
from ..stacks import LayerStack, resolve_stack
from . import closed_form
from .losses import HeldOutLoss

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ClosedForm:
    """Training-free repair by least squares; see [`closed_form.fit`].

    Attributes:
        max_tokens: Tokens of the data to use, three quarters to fit on and the rest to choose by.
        max_length: Tokens a sequence.
        batch_size: Sequences a batch.
    """

    max_tokens: int = 32768
    max_length: int = 512
    batch_size: int = 4


# One batch in so many is not fitted to: ridges are chosen on it, and whether the repair is kept.
HELD_OUT = 4
REPAIRS = {"closed-form": ClosedForm}


def repair_config(repair: str | ClosedForm) -> ClosedForm:
    """The settings that a name stands for.

    Raises:
        LayerProbeError: No such repair.
    """
    if isinstance(repair, tuple(REPAIRS.values())):
        return repair
    if not isinstance(repair, str) or repair not in REPAIRS:
        raise LayerProbeError(f"repair={repair!r} is not known; expected one of {', '.join(map(repr, REPAIRS))}.")
    return REPAIRS[repair]()


def repair_model(
    pruned: PreTrainedModel,
    original: PreTrainedModel,
    keep: Sequence[int],
    data: Any,
    *,
    repair: str | ClosedForm = "closed-form",
    stack: str | LayerStack | None = None,
    tokenizer=None,
) -> dict[str, Any]:
    """Repairs a pruned model in place, or leaves it as it was if the loss on held-out data does not improve.

    One batch in four is held out. The loss that decides is the model's own where the batches have labels, the next-token
    loss of a causal language model, and the distance to the original's outputs otherwise.

    Args:
        pruned: The pruned model, with tensors of its own.
        original: The model that it came from; left as it was.
        keep: The original's layers that it has (0-based, ascending).
        data: As for [`score_layers`]: texts or a data set with `tokenizer`, or batches of model inputs. Not what the
            result will be evaluated on.
        repair: `"closed-form"`, or its settings.
        stack: Path of the stack; the main one by default.
        tokenizer: Needed for texts.

    Returns:
        What was done: method and settings, the loss and its kind before and after, whether it was kept, and what each
        layer gained.

    Raises:
        LayerProbeError: An unknown repair, data that makes fewer than two batches, or layers that cannot be fitted.
    """
    config = repair_config(repair)
    if data is None:
        raise LayerProbeError("A repair is fitted to data: pass data= (and tokenizer= for texts).")
    before, after = resolve_stack(original, stack), resolve_stack(pruned, stack)
    rows = list(
        batches(
            data, original, tokenizer, batch_size=config.batch_size, max_length=config.max_length,
            max_tokens=config.max_tokens,
        )
    )  # fmt: skip
    if len(rows) < 2:
        raise LayerProbeError(
            f"The data makes {len(rows)} batch of at most {config.batch_size} sequences; a repair needs at least two, one "
            "to fit and one to check on. Pass more."
        )
    held_out = rows[1::HELD_OUT]
    fitted = [row for number, row in enumerate(rows) if number % HELD_OUT != 1]
    loss = HeldOutLoss(original, held_out)
    losses = {"original": loss.of(original), "pruned": loss.of(pruned)}
    fixed = {"use_cache": False} if "use_cache" in inspect.signature(original.forward).parameters else {}
    with evaluating(original, pruned), torch.no_grad():
        changed = closed_form.fit(before, after, keep, fitted, held_out, fixed)
    losses["repaired"] = loss.of(pruned)
    kept = losses["repaired"] < losses["pruned"]  # false for NaN too
    if not kept:
        for _, _, site in changed:
            site.restore()
        logger.warning(
            f"The closed-form repair was undone: the held-out loss ({loss.name}) was {losses['pruned']:.4f} before it and "
            f"{losses['repaired']:.4f} after."
        )
    return {
        "method": "closed-form",
        "settings": asdict(config),
        "kept": kept,
        "loss": loss.name,
        "held_out_loss": losses,
        "layers": [{"layer": index, "error_removed": share} for index, share, _ in changed],
    }

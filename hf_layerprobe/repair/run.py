"""`repair_model`: runs a repair on a pruned model, and keeps it only if the held-out loss improves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import ceil, isnan
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..activations import batches
from ..activations.fingerprint import used_text
from ..errors import LayerProbeError
from ..modes import evaluating
from ..stacks import LayerStack, resolve_stack
from . import closed_form
from .checkpoints import check_training, checkpoint_folder
from .healer import teacher_map
from .losses import HeldOutLoss
from .settings import ClosedForm, Repair, repair_config
from .training import train

logger = logging.get_logger(__name__)
# One batch in so many is not fitted to: choices are made on it, and whether the repair is kept.
HELD_OUT = 4
MOST_HELD_OUT = 16
PRIVATE = ("output_dir", "adapter_dir", "arguments")


def repair_model(
    pruned: PreTrainedModel,
    original: PreTrainedModel,
    keep: Sequence[int],
    data: Any,
    *,
    repair: str | Repair = "closed-form",
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
        repair: `"closed-form"`, `"lora"` or `"finetune"`, or settings: [`ClosedForm`], [`Lora`], [`Finetune`].
        stack: Path of the stack; the main one by default.
        tokenizer: Needed for texts.

    Returns:
        What was done: method and settings, the loss and its kind before and after, whether it was kept, and what each
        layer gained.

    Raises:
        LayerProbeError: An unknown repair, data that makes fewer than two batches or leaves nothing held out to predict, a
            held-out loss that is NaN, or layers that cannot be fitted.
    """
    settings = repair_config(repair)
    if data is None:
        raise LayerProbeError("A repair is fitted to data: pass data= (and tokenizer= for texts).")
    before, after = resolve_stack(original, stack), resolve_stack(pruned, stack)
    read = batches(
        data, original, tokenizer, batch_size=settings.batch_size, max_length=settings.max_length,
        max_tokens=settings.max_tokens,
    )  # fmt: skip
    rows = list(read)
    if len(rows) < 2:
        raise LayerProbeError(
            f"The data makes {len(rows)} batch of at most {settings.batch_size} sequences; a repair needs at least two, one "
            "to fit and one to check on. Pass more."
        )
    chosen = set(range(1, len(rows), HELD_OUT)) if isinstance(settings, ClosedForm) else _spread(len(rows))
    held_out = [row for number, row in enumerate(rows) if number in chosen]
    fitted = [row for number, row in enumerate(rows) if number not in chosen]
    loss = HeldOutLoss(original, held_out)
    losses = {"original": loss.of(original), "pruned": loss.of(pruned)}
    if undefined := [name for name, value in losses.items() if isnan(value)]:
        raise LayerProbeError(
            f"The held-out loss ({loss.name}) of the {' and of the '.join(undefined)} model is NaN, so no repair can be judged "
            "by it. Run the models in float32 or bfloat16."
        )
    report: dict[str, Any] = {}
    if all("input_ids" in row for row in rows):
        report["data"] = {**used_text(rows, original), **read.choices}
    report |= {"method": settings.name, "settings": _recorded(settings), "loss": loss.name}
    plain = {name: tensor.clone() for name, tensor in after.layers.state_dict().items()}
    try:
        kept = _repair(before, after, keep, fitted, settings, loss, losses, report, plain)
    except BaseException:
        after.layers.load_state_dict(plain)
        raise
    finally:
        torch.clear_autocast_cache()  # the caller's, if there is one, has copies of weights that are gone
    if not kept:
        logger.warning(
            f"The {settings.name} repair was undone: no change made the held-out loss ({loss.name}) less than "
            f"{losses['pruned']:.4f}, that of the pruned model as it is."
        )
    return {**report, "kept": kept, "held_out_loss": losses}


def _repair(before, after, keep, fitted, settings, loss, losses, report, plain) -> bool:
    """Whether anything was kept; `losses` and `report` are added to."""
    original, pruned, training = before.model, after.model, not isinstance(settings, ClosedForm)
    if training:
        check_training(before, fitted, settings)
        checkpoints = checkpoint_folder(before, keep, fitted, settings)
    if not training or settings.closed_form:
        try:
            rows = closed_form.first(fitted, ClosedForm.max_tokens) if training else fitted
            report["layers"] = _closed_form(before, after, keep, rows, loss, plain)
        except LayerProbeError as error:
            if not training:
                raise
            after.layers.load_state_dict(plain)  # the layers before the one that cannot be fitted
            logger.info(f"The training starts without the closed-form repair: {error}")
        losses["closed-form"] = losses["repaired"] = loss.of(pruned)
    kept = bool(report.get("layers"))
    if not training:
        return kept
    start = losses.get("closed-form", losses["pruned"])

    def improves(model: PreTrainedModel) -> bool:
        losses["trained"] = loss.of(model)
        return losses["trained"] < start  # false for NaN too

    with evaluating(original, pruned):  # the Trainer's modes are not the caller's
        report["trained"] = train(after, before, keep, fitted, settings, checkpoints, improves)
    report["teacher_map"] = {str(s): t for s, t in teacher_map(keep, before.num_layers).items()}
    losses["repaired"] = losses["trained"] if report["trained"] else start
    if not report["trained"]:
        logger.warning(
            f"The training was undone: the held-out loss ({loss.name}) was {start:.4f} before it and "
            f"{losses['trained']:.4f} after."
        )
    return kept or report["trained"]


def _closed_form(before, after, keep, fitted, loss, plain) -> list[dict[str, Any]]:
    """What each layer gained; no layer is changed, and the list is empty, where the loss does not improve."""
    original, pruned = before.model, after.model
    least = loss.of(pruned)
    with evaluating(original, pruned), torch.no_grad():
        layers = closed_form.fit(before, after, keep, fitted, loss)
    if loss.of(pruned) < least:
        return layers
    after.layers.load_state_dict(plain)
    return []


def _spread(number: int) -> set[int]:
    """One batch in four, at most sixteen: a training is judged once, and what is held out is not learnt from."""
    return set(range(1, number, max(HELD_OUT, ceil(number / MOST_HELD_OUT))))


def _recorded(settings: Repair) -> dict[str, Any]:
    """What a plan, which may be pushed, says of the settings: no place on this machine, and no token."""
    return {name: value for name, value in asdict(settings).items() if name not in PRIVATE}

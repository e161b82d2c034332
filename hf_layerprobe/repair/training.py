"""Repair by training: full weights beside the cuts or LoRA, from a teacher or from the text, through `Trainer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..activations.text import Batch
from ..errors import LayerProbeError
from ..precision import gains_from_bfloat16
from ..scores.loss import IGNORED
from ..stacks import LayerStack
from ..stacks.bypass import hidden_output
from .distillation import distillation_loss
from .losses import predicts_next
from .settings import Finetune, Lora

# A layer of the teacher, and the student's layer that should give the same stream.
Pair = tuple[nn.Module, nn.Module]


def teacher_map(keep: Sequence[int], num_layers: int) -> dict[int, int]:
    """For each layer of the pruned model the original's layer whose output it should give: the last before the next kept."""
    ends = [*(index - 1 for index in keep[1:]), num_layers - 1]
    return dict(enumerate(ends))


def train(
    pruned: LayerStack,
    original: LayerStack,
    keep: Sequence[int],
    batches: Sequence[Batch],
    settings: Finetune,
    improves: Callable[[PreTrainedModel], bool],
) -> bool:
    """Trains a pruned model in place; weights and flags are as before where that does not improve it.

    Args:
        pruned: The stack of the pruned model.
        original: The stack of the untouched model, the teacher.
        keep: The original's layers in the pruned one.
        batches: What to train on.
        settings: How.
        improves: Whether the trained model is better.

    Returns:
        Whether it was kept.

    Raises:
        LayerProbeError: A time budget too short for one step, or a batch without anything to learn from.
    """
    model = pruned.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    ends = teacher_map(keep, original.num_layers)
    pairs = [(original.layers[t], pruned.layers[s]) for s, t in ends.items() if t != keep[s]]
    try:
        if isinstance(settings, Lora):
            config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
            adapted = get_peft_model(model, config)
            kept = False
            try:
                _run(adapted, original.model, pairs, batches, settings)
                kept = improves(model)
            finally:
                if kept and settings.adapter_dir is not None:
                    adapted.save_pretrained(settings.adapter_dir)
                with _without_autocast(model.device):
                    adapted.merge_and_unload() if kept else adapted.unload()
            return kept
        beside = _beside(keep, original.num_layers, settings.beside)
        chosen = {id(p) for position in beside for p in pruned.layers[position].parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        kept = False
        try:
            _run(model, original.model, pairs, batches, settings)
            kept = improves(model)
        finally:
            if not kept:
                for parameter, value in before:
                    parameter.data.copy_(value)
        return kept
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _beside(keep: Sequence[int], num_layers: int, number: int | None) -> list[int]:
    """Positions in the pruned model within `number` layers of a cut; all of them for None."""
    if number is None:
        return list(range(len(keep)))
    ends = [-1, *keep, num_layers]
    # Cut c lies before position c.
    cuts = [c for c in range(len(keep) + 1) if ends[c + 1] - ends[c] > 1]
    return [p for p in range(len(keep)) if any(c - number <= p < c + number for c in cuts)]


def _run(
    model: nn.Module, teacher: PreTrainedModel, pairs: Sequence[Pair], batches: Sequence[Batch], settings: Finetune
) -> None:
    device = next(model.parameters()).device
    with TemporaryDirectory() as temporary:
        checkpoints = settings.output_dir
        arguments = TrainingArguments(
            **{
                "output_dir": checkpoints or temporary,
                "max_steps": settings.steps or len(batches),
                "learning_rate": settings.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": max(1, (settings.steps or len(batches)) // 20),
                "save_strategy": "no" if checkpoints is None else "steps",
                "report_to": "none",
                "logging_strategy": "no",
                "use_cpu": device.type == "cpu",
                "bf16": gains_from_bfloat16(device),
                **settings.arguments,
                # One batch is one example: they are made elsewhere, for any modality.
                "per_device_train_batch_size": 1,
                "remove_unused_columns": False,
                "label_names": [],
            }
        )
        clock = _Clock(settings.minutes)
        trainer = _Healer(
            model, arguments, train_dataset=list(batches), data_collator=lambda rows: dict(rows[0]), callbacks=[clock],
            teacher=teacher if settings.teacher else None, pairs=pairs, settings=settings,
        )  # fmt: skip
        last = get_last_checkpoint(checkpoints) if checkpoints is not None and Path(checkpoints).is_dir() else None
        try:
            with _without_autocast(device):
                trainer.train(resume_from_checkpoint=last)
        finally:
            trainer.unwatch()


def _without_autocast(device: torch.device) -> torch.autocast:
    """A caller's autocast would keep its copies of the weights until it ends, and so take every step from where the first
    one stood; the Trainer's own makes them anew in each."""
    return torch.autocast(device.type, enabled=False, cache_enabled=False)


class _Clock(TrainerCallback):
    """Ends the training when the time is up."""

    def __init__(self, minutes: float | None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.minutes = minutes

    def on_step_end(self, args, state, control, **_):
        if self.deadline is not None and time.monotonic() > self.deadline:
            if state.global_step <= 1:
                raise LayerProbeError(
                    f"minutes={self.minutes} is too short for one training step. Give it more, or smaller batches."
                )
            control.should_training_stop = True


class _Healer(Trainer):
    """A Trainer whose loss is the distance to a teacher, or that of the next tokens."""

    def __init__(self, *args, teacher: PreTrainedModel | None, pairs: Sequence[Pair], settings: Finetune, **options):
        super().__init__(*args, **options)
        self.teacher, self.settings = teacher, settings
        self.pairs = pairs if teacher is not None and settings.hidden_weight > 0 else ()
        self.causal = teacher is not None and predicts_next(teacher)
        self.model_accepts_loss_kwargs = False  # the loss is a mean already
        self._streams: dict[nn.Module, torch.Tensor] = {}
        self._watching = [layer.register_forward_hook(self._note) for pair in self.pairs for layer in pair]

    def unwatch(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self._watching:
            handle.remove()

    def _note(self, layer: nn.Module, _args: tuple, output: Any) -> None:
        self._streams[layer] = hidden_output(output)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            inputs = dict(inputs)
            if "labels" not in inputs:
                if "input_ids" not in inputs:
                    raise LayerProbeError("Without a teacher the batches need labels to learn from.")
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                inputs["labels"] = torch.where(mask, inputs["input_ids"], IGNORED)
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        labels = inputs.get("labels")
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**inputs)
        if "logits" not in wanted:
            raise LayerProbeError(f"{type(self.teacher).__name__} has no logits to learn from; pass teacher=False.")
        counted = inputs.get("attention_mask")
        learnt = None
        if self.settings.text_weight and self.causal:
            if labels is None:
                labels = inputs["input_ids"] if counted is None else inputs["input_ids"].where(counted.bool(), IGNORED)
            learnt = pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = distillation_loss(outputs.logits, wanted.logits, counted, learnt, self.settings.text_weight)
        if self.pairs:
            errors = [_relative_error(self._streams[t], self._streams[s], counted) for t, s in self.pairs]
            loss = loss + self.settings.hidden_weight * torch.stack(errors).mean()
        return (loss, outputs) if return_outputs else loss


def _relative_error(wanted: torch.Tensor, found: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    wanted, found = wanted.float(), found.float()
    return _mean((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6), mask)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)

"""The Trainer that heals: its loss is the distance to the untouched model, or that of the text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..activations.masks import TokenMasks
from ..activations.text import Batch, decoder_inputs
from ..errors import LayerProbeError
from ..scores.loss import IGNORED, next_tokens
from ..stacks import LayerStack
from ..stacks.bypass import hidden_output
from .distillation import distillation_loss
from .losses import counted, predicts_next, value_errors
from .settings import Finetune


def teacher_map(keep: Sequence[int], num_layers: int) -> dict[int, int]:
    """For each layer of the pruned model the original's layer whose output it should give: the last before the next kept."""
    ends = [*(index - 1 for index in keep[1:]), num_layers - 1]
    return dict(enumerate(ends))


class Clock(TrainerCallback):
    """Ends the training when the time is up."""

    def __init__(self, minutes: float | None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.minutes = minutes

    def on_step_end(self, args, state, control, **_):
        if self.deadline is None or time.monotonic() <= self.deadline or state.global_step >= state.max_steps:
            return
        if state.global_step <= 1:
            raise LayerProbeError(
                f"minutes={self.minutes} is too short for one training step. Give it more, or smaller batches."
            )
        control.should_training_stop = True
        control.should_save = args.save_strategy != SaveStrategy.NO


class Healer(Trainer):
    """A Trainer whose loss is the distance to a teacher, or that of the next tokens."""

    def __init__(
        self, *args, pruned: LayerStack, original: LayerStack, keep: Sequence[int], settings: Finetune, **options
    ):
        super().__init__(*args, **options)
        self.teacher, self.settings = original.model, settings
        self.causal = predicts_next(original.model)
        self.model_accepts_loss_kwargs = False  # the loss is a mean already
        hidden = settings.teacher and settings.hidden_weight > 0
        ends = teacher_map(keep, original.num_layers) if hidden else {}
        # A layer of the teacher, and the student's layer that should give the same stream.
        self.pairs = [(original.layers[t], pruned.layers[s]) for s, t in ends.items() if t != keep[s]]
        self._masks = TokenMasks(original)
        self._streams: dict[nn.Module, torch.Tensor] = {}
        self._watching = [layer.register_forward_hook(self._note) for pair in self.pairs for layer in pair]

    def unwatch(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self._watching:
            handle.remove()

    def _note(self, layer: nn.Module, _args: tuple, output: Any) -> None:
        self._streams[layer] = hidden_output(output)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        if not self.settings.teacher:
            if "labels" not in inputs:
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                inputs["labels"] = torch.where(mask, inputs["input_ids"], IGNORED)
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        labels = inputs.pop("labels", None)
        if labels is not None and labels.dim() == 2 and self.teacher.can_generate():
            # What a decoder reads, the model would make from the labels.
            inputs = {**decoder_inputs(self.teacher, labels, labels != IGNORED), **inputs}
        outputs = model(**inputs)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**inputs)
        if "logits" not in wanted:
            raise LayerProbeError(f"{type(self.teacher).__name__} has no logits to learn from; pass teacher=False.")
        loss = self._distance(outputs.logits, wanted.logits, inputs, labels)
        if self.pairs:
            self._masks.begin((), inputs)
            errors = [self._relative_error(self._streams[t], self._streams[s]) for t, s in self.pairs]
            loss = loss + self.settings.hidden_weight * torch.stack(errors).mean()
        return (loss, outputs) if return_outputs else loss

    def _distance(self, found: torch.Tensor, wanted: torch.Tensor, inputs: Batch, labels: torch.Tensor | None):
        mask = counted(inputs, self.teacher)
        if found.shape[-1] == 1:
            return _mean(value_errors(found, wanted), mask)
        learnt = None
        if self.settings.text_weight and self.causal:
            labels = next_tokens(inputs) if labels is None else labels[:, 1:]
            learnt = pad(labels, (0, 1), value=IGNORED)
        elif self.settings.text_weight and self.teacher.config.is_encoder_decoder and labels is not None:
            learnt = labels if labels.shape == found.shape[:-1] else None  # what the decoder says at their places
        return distillation_loss(found, wanted, mask, learnt, self.settings.text_weight)

    def _relative_error(self, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        try:
            mask = self._masks.fit(wanted)
        except LayerProbeError:  # which tokens are padding is not known: all count
            mask = None
        wanted, found = wanted.float(), found.float()
        return _mean((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6), mask)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)

"""Repair by training: full weights beside the cuts or LoRA, from a teacher or from the text, through `Trainer`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..activations.text import Batch
from ..precision import gains_from_bfloat16
from ..stacks import LayerStack
from .healer import Clock, Healer
from .settings import Finetune, Lora

Run = Callable[[nn.Module], None]
Improves = Callable[[PreTrainedModel], bool]

# What a Trainer puts on a model: `Accelerator.prepare`, to run it under autocast, and checkpointing, for frozen embeddings.
HOOKS = ("_require_grads_hook", "_require_grads_hooks")
ATTRIBUTES = ("forward", "_original_forward", "_is_accelerate_prepared", *HOOKS)


def train(
    pruned: LayerStack,
    original: LayerStack,
    keep: Sequence[int],
    batches: Sequence[Batch],
    settings: Finetune,
    checkpoints: Path | None,
    improves: Improves,
) -> bool:
    """Trains a pruned model in place; weights and flags are as before where that does not improve it.

    Args:
        pruned: The stack of the pruned model.
        original: The stack of the untouched model, the teacher.
        keep: The original's layers in the pruned one.
        batches: What to train on.
        settings: How.
        checkpoints: Where the Trainer keeps its checkpoints, and looks for one to go on from; see [`checkpoint_folder`].
        improves: Whether the trained model, as it will be, is better.

    Returns:
        Whether it was kept.

    Raises:
        LayerProbeError: A time budget too short for one step, or a teacher without logits.
    """
    model, device = pruned.model, pruned.model.device
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def run(module: nn.Module) -> None:
        """Trains what is not frozen in the model, or in the model with an adapter."""
        with TemporaryDirectory() as temporary, _put_back(model), _accelerate_put_back(), _without_autocast(device):
            arguments = _arguments(settings, len(batches), checkpoints or temporary, device)
            trainer = Healer(
                module, arguments, train_dataset=list(batches), data_collator=lambda rows: dict(rows[0]),
                callbacks=[Clock(settings.minutes)], pruned=pruned, original=original, keep=keep, settings=settings,
            )  # fmt: skip
            last = None if checkpoints is None else get_last_checkpoint(checkpoints)
            try:
                with torch.enable_grad():
                    trainer.train(resume_from_checkpoint=last)
            finally:
                trainer.unwatch()

    try:
        with _seeds():
            if isinstance(settings, Lora):
                return _train_adapter(model, settings, run, improves)
            layers = [pruned.layers[p] for p in _beside(keep, original.num_layers, settings.beside)]
            return _train_layers(model, layers, run, improves)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _train_adapter(model: PreTrainedModel, settings: Lora, run: Run, improves: Improves) -> bool:
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    # Sums in half precision are not undone by differences.
    before = [(p, p.detach().clone()) for name, p in model.named_parameters() if ".base_layer." in name]
    kept = False
    try:
        run(adapted)
        with _without_autocast(model.device):
            adapted.merge_adapter()
        if improves(model):  # merged: in half precision that is another model than the one that was trained
            if settings.adapter_dir is not None:
                adapted.save_pretrained(settings.adapter_dir)
            kept = True
    finally:
        if not kept:
            _restore(before)
        adapted.unload()
        vars(model).pop("peft_config", None)  # PEFT left it there in earlier versions
    return kept


def _train_layers(model: PreTrainedModel, layers: Sequence[nn.Module], run: Run, improves: Improves) -> bool:
    model.requires_grad_(False)
    before = [(p, p.detach().clone()) for layer in layers for p in layer.requires_grad_(True).parameters()]
    kept = False
    try:
        run(model)
        kept = improves(model)
    finally:
        if not kept:
            _restore(before)
    return kept


def _restore(before: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, value in before:
        parameter.data.copy_(value)


def _beside(keep: Sequence[int], num_layers: int, number: int | None) -> list[int]:
    """Positions in the pruned model within `number` layers of a cut; all of them for None."""
    if number is None:
        return list(range(len(keep)))
    ends = [-1, *keep, num_layers]
    # Cut c lies before position c.
    cuts = [c for c in range(len(keep) + 1) if ends[c + 1] - ends[c] > 1]
    return [p for p in range(len(keep)) if any(c - number <= p < c + number for c in cuts)]


def _arguments(settings: Finetune, batches: int, output_dir: str | Path, device: torch.device) -> TrainingArguments:
    steps = settings.steps or ceil(batches / settings.arguments.get("gradient_accumulation_steps", 1))
    return TrainingArguments(
        **{
            "output_dir": str(output_dir),
            "max_steps": steps,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 20),
            "save_strategy": "no" if settings.output_dir is None else "steps",
            "report_to": "none",
            "logging_strategy": "no",
            "use_cpu": device.type == "cpu",
            "bf16": gains_from_bfloat16(device) and not settings.arguments.get("fp16"),
            **settings.arguments,
            # One batch is one example: they are made elsewhere, for any modality.
            "per_device_train_batch_size": 1,
            "remove_unused_columns": False,
            "label_names": [],
        }
    )


@contextmanager
def _put_back(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, a Trainer may do to a model what it does; afterwards all but the weights is as it was."""
    own = {name: vars(model)[name] for name in ATTRIBUTES if name in vars(model)}
    cache = {name: value for name, value in vars(model.config).items() if name == "use_cache"}
    checkpointing = [(m, m.gradient_checkpointing) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    try:
        yield
    finally:
        for module, flag in checkpointing:
            module.gradient_checkpointing = flag
        if HOOKS[0] in vars(model) and HOOKS[0] not in own:
            model.disable_input_require_grads()
        for name in ATTRIBUTES:
            vars(model).pop(name, None)
        vars(model).update(own)
        vars(model.config).pop("use_cache", None)
        vars(model.config).update(cache)


@contextmanager
def _accelerate_put_back() -> Iterator[None]:
    """Within the context, a Trainer sets what all of accelerate's objects share: precision, gradient accumulation. Afterwards
    those of the caller have their own again."""
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(each) for each in shared]
    try:
        yield
    finally:
        for each, values in zip(shared, before, strict=True):
            each.clear()
            each.update(values)


@contextmanager
def _seeds() -> Iterator[None]:
    """Within the context, adapters draw weights and a Trainer seeds; afterwards what the caller draws is as it was."""
    before, before_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def _without_autocast(device: torch.device) -> torch.autocast:
    """A caller's autocast would keep its copies of the weights until it ends, and so take every step from where the first
    one stood; the Trainer's own makes them anew in each."""
    return torch.autocast(device.type, enabled=False, cache_enabled=False)

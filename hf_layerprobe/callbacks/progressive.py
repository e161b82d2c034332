"""`ProgressivePruningCallback`: the model loses layers while it trains, and goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from operator import index
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from ..errors import LayerProbeError
from ..modes import in_own_precision
from ..scores import LayerScores
from ..scores.registry import get_score
from ..scores.run import ALIASES
from ..search.choose import least_important
from ..stacks import resolve_stack
from ..stacks.adapters import base_modules, is_peft_model
from ..surgery.in_place import prune_in_place
from .measurement import PREFIX
from .passes import Passes, around
from .settings import check_choice, drop_twins
from .trackers import log_numbers, on_call_stack

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class ProgressivePruningCallback(TrainerCallback, ExportableState):
    """Removes the least important layers from the model in training: `ProgressivePruningCallback({200: 1, 400: 2})`.

    At each of the given steps, after the optimizer's, the layers with the lowest score go. The score is measured on the
    training batches of the last `window` steps (scores of the weights on the weights of that moment). Modules and
    parameters that stay are the same objects, so that the optimizer keeps their state; that of the others is dropped.
    Checkpoints from then on are plain models with fewer layers. What is left is checked as by [`prune_layers`]; layers that
    the architecture cannot lose are passed over for the next ones, and where none can go, training goes on with a line in
    the log.

    The best model of `load_best_model_at_end` is sought among the checkpoints after the last removal, since an earlier one
    has other layers. To resume, build the model from the checkpoint: `from_pretrained("out/checkpoint-400")`.

    `trainer.state.log_history` and the trackers get `layerprobe/pruned/num_layers`.

    Args:
        at: Global step → how many layers go; or a list of steps, at each of which one goes.
        by: A registered score of activations, or `"docs"`.
        window: Training steps that the score is measured on, the one before the removal the last.
        scheduler: `"keep"` goes on with the learning rates as planned; `"restart"` begins the schedule anew over the steps
            that are left, warm-up included.
        stack: Path of the stack; the main one by default.
        verify: Check what is left; see [`prune_layers`].

    Attributes:
        removed: Step → the layers that went, by the numbers that they had at the start of the run.

    Raises:
        LayerProbeError: Steps, a score or a scheduler that cannot be. At the start of training: several processes,
            adapters, a checkpoint with other layers than the model, or a removal that would leave no layer.
    """

    at: Mapping[int, int] | Sequence[int]
    by: str = "avss"
    _: KW_ONLY
    window: int = 8
    scheduler: str = "keep"
    stack: str | None = None
    verify: bool = True

    def __post_init__(self):
        self.at = _removals(self.at)
        if type(self.window) is not int or self.window < 1:
            raise LayerProbeError(f"window is a positive number of steps, got {self.window!r}.")
        check_choice("scheduler", self.scheduler, ("keep", "restart"))
        self._score = get_score(ALIASES.get(self.by, self.by))
        if self._score.own_runs or self.by in ("last", "random"):
            raise LayerProbeError(
                f"ProgressivePruningCallback cannot prune by {self.by!r}; use avss, influence or docs."
            )
        self.removed: dict[int, list[int]] = {}
        self._layers: list[int] = []  # those left
        self._passes: Passes | None = None
        self._measuring = False
        self._undo = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"args": arguments, "attributes": {"removed": self.removed, "_layers": self._layers}}

    def on_train_begin(self, args, state, control, model=None, **context):
        if args.world_size > 1:
            raise LayerProbeError(
                f"ProgressivePruningCallback works in one process, and this training has {args.world_size}: their wrappers "
                "hold on to parameters that go. Train in one, or prune afterwards with prune_layers."
            )
        if is_peft_model(model) or any(around is not None for _, _, around in base_modules(model)):
            raise LayerProbeError(
                "ProgressivePruningCallback removes layers of whole models: adapters saved on the way would fit a base model "
                "that is saved nowhere. Merge them first, or use PruneOnTrainEndCallback."
            )
        handler = on_call_stack(CallbackHandler)
        if handler is not None:
            drop_twins(self, handler.callbacks)
        found = resolve_stack(model, self.stack)
        ahead = sum(number for step, number in self.at.items() if state.global_step < step <= state.max_steps)
        if not ahead:
            logger.warning(
                f"ProgressivePruningCallback will remove nothing: steps {list(self.at)} do not come in this training "
                f"({state.global_step + 1} to {state.max_steps})."
            )
        if ahead >= found.num_layers:
            raise LayerProbeError(
                f"at={self.at} would remove {ahead} of the {found.num_layers} layers of {found.path!r}; one must stay."
            )
        self._begin(state, found.num_layers)
        trainer = on_call_stack(Trainer)
        if self._undo is None and trainer is not None and self._score.streams:
            self._trainer = weakref.ref(trainer)
            self._undo = around(trainer, "training_step", self._around_step)

    def on_step_begin(self, args, state, control, model=None, **context):
        step = state.global_step + 1
        self._measuring = self._score.streams and any(at - self.window < step <= at for at in self.at)
        if self._measuring and self._passes is None:
            self._passes = Passes(resolve_stack(model, self.stack), {self.by: self._score})

    def on_substep_end(self, args, state, control, **context):
        if self._measuring:
            self._passes.count()

    def on_step_end(self, args, state, control, **context):
        self.on_substep_end(args, state, control)
        if state.global_step not in self.at:
            return
        try:
            removed, gone = self._prune(context["model"], self.at[state.global_step])
        except LayerProbeError as error:  # of a training that may have run for days; it loses nothing
            logger.warning(f"No layer was removed at step {state.global_step}: {error}")
            return
        finally:
            self._passes, self._measuring = None, False
        self.removed[state.global_step] = removed
        self._layers = [layer for layer in self._layers if layer not in removed]
        _forget(context["optimizer"], gone)
        if self.scheduler == "restart":
            _restart(context["lr_scheduler"], _innermost(context["optimizer"]), args, state)
        # An earlier checkpoint has other layers: it could not be loaded into this model as its best.
        state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None
        log_numbers({f"{PREFIX}/pruned/num_layers": float(len(self._layers))}, args, state, control, context)

    def on_train_end(self, args, state, control, **context):
        if self._undo is not None:
            self._undo()
            self._undo = None

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        if not self._measuring:
            yield
            return
        with self._passes.open(training=True, compiled=self._trainer().args.torch_compile):
            yield

    def _prune(self, model: nn.Module, number: int) -> tuple[list[int], list[nn.Parameter]]:
        found = resolve_stack(model, self.stack)
        score = self._score
        if not score.needs_data:
            values, details = score.make(found)
            scores = LayerScores(score.name, values, score.higher_is_more_important, found.path, score.source, details)
        elif self._passes.missed or not self._passes.seen:
            raise LayerProbeError(f"{self.by} could not be measured on {self._passes.missed} of the batches before.")
        else:
            scores = self._passes.result(self.by)
        if not np.isfinite(scores.values).all():
            bad = np.flatnonzero(~np.isfinite(scores.values)).tolist()
            raise LayerProbeError(f"{self.by} is not finite for layers {bad} of {found.path!r}.")
        removed, note = least_important(found, scores, number)
        with in_own_precision(model):
            gone = prune_in_place(found, removed, verify=self.verify)
        numbers = [self._layers[layer] for layer in removed]
        logger.warning(
            f"Removed layers {numbers} of {found.path!r} by {self.by}, as numbered at the start; {found.num_layers} are "
            f"left.{f' ({note})' if note else ''}"
        )
        return numbers, gone

    def _begin(self, state, num_layers: int) -> None:
        """Starts counting, or goes on where the checkpoint stands."""
        self._layers, self.removed = (self._layers, self.removed) if state.global_step else ([], {})
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self._layers = saved["attributes"]["_layers"]
            self.removed = {int(step): layers for step, layers in saved["attributes"]["removed"].items()}
        if self._layers and len(self._layers) != num_layers:
            raise LayerProbeError(
                f"The checkpoint of step {state.global_step} has {len(self._layers)} layers, and the model was built with "
                f"{num_layers}, so that weights are mixed up now. Build the model from the checkpoint, then resume."
            )
        self._layers = self._layers or list(range(num_layers))


def _removals(at: Any) -> dict[int, int]:
    """Step → number of layers, ascending. A checkpoint has the steps as strings, which JSON wants for keys."""
    try:
        pairs = at.items() if isinstance(at, Mapping) else [(step, 1) for step in at]
        found = sorted((int(step) if isinstance(step, str) else index(step), index(number)) for step, number in pairs)
    except (TypeError, ValueError):
        found = []
    if not found or any(number < 1 for pair in found for number in pair):
        raise LayerProbeError(f"at is a mapping of steps to numbers of layers, or a list of steps; got {at!r}.")
    return dict(found)


def _innermost(optimizer: Any) -> Optimizer:
    """The optimizer itself, inside what accelerate puts around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _forget(optimizer: Any, gone: Sequence[nn.Parameter]) -> None:
    """Takes parameters out of an optimizer; the others keep their state."""
    optimizer, ids = _innermost(optimizer), {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def _restart(scheduler: Any, optimizer: Optimizer, args, state) -> None:
    """Begins the Trainer's schedule anew over the steps that are left, in the scheduler that the Trainer holds."""
    left = state.max_steps - state.global_step
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    new = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(left),
        num_training_steps=left,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    scheduler.__class__ = type(new)
    vars(scheduler).clear()
    vars(scheduler).update(vars(new))

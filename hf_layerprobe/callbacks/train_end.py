"""`PruneOnTrainEndCallback`: a smaller model beside the trained one, measured, saved and pushed."""

from __future__ import annotations

import copy
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.utils import logging

from ..errors import LayerProbeError
from ..modes import in_own_precision
from ..plan import PruningPlan, plan_pruning, requested
from ..prune import prune_layers
from ..scores.registry import get_score
from ..scores.run import ALIASES
from ..search.choose import least_important
from ..stacks import LayerStack, bypassed, resolve_stack
from .measurement import PREFIX
from .passes import Passes
from .settings import drop_twins
from .trackers import log_numbers, on_call_stack

logger = logging.get_logger(__name__)
NOT_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(eq=False)
class PruneOnTrainEndCallback(TrainerCallback):
    """When training ends, prunes a copy of the model, evaluates both and saves the smaller: `PruneOnTrainEndCallback(ratio=0.25)`.

    The Trainer's own evaluation runs on the trained model (the best one, with `load_best_model_at_end`), and the score is
    measured on its batches; then it runs without the removed layers. The Trainer's model is left as it is. The pruned one is
    verified and saved in `output_dir/pruned-<step>`, beside the checkpoints, with the tokenizer, the plan and a model card;
    with `push_to_hub=True` in the arguments of the Trainer it goes to `<hub_model_id>-pruned`, with the same token, privacy
    and revision.

    `log_history` and the trackers get `layerprobe/dense/<metric>` and `layerprobe/pruned/<metric>`. What goes wrong is said
    in one line of the log, and ends nothing.

    Args:
        ratio: Share of the layers to remove.
        num_layers: Number of layers to remove, instead of a ratio.
        by: A registered score of activations, or `"docs"`.
        stack: Path of the stack; the main one by default.
        verify: Check the pruned model; see [`prune_layers`].

    Attributes:
        pruned: The pruned model.
        plan: The plan that was carried out.
        before: Metrics of the trained model.
        after: Metrics of the pruned model: those of the trained one with these layers bypassed, which is what the pruned
            one is verified against.

    Raises:
        LayerProbeError: An unknown score, or one that needs data of its own; neither or both of `ratio` and `num_layers`.
            At the start of training: no such stack, or a number of layers that it does not have.
    """

    ratio: float | None = None
    _: KW_ONLY
    num_layers: int | None = None
    by: str = "avss"
    stack: str | None = None
    verify: bool = True

    def __post_init__(self):
        if (self.ratio is None) == (self.num_layers is None):
            raise LayerProbeError("Say how much to remove by exactly one of ratio and num_layers.")
        self._score = get_score(ALIASES.get(self.by, self.by))
        if self._score.own_runs:
            raise LayerProbeError(
                f"{self.by!r} runs the model by itself; use avss, influence or docs, or prune_layers."
            )
        self.pruned: PreTrainedModel | None = None
        self.plan: PruningPlan | None = None
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **context):
        requested(resolve_stack(model, self.stack).num_layers, self.ratio, self.num_layers)
        # First in line, because trackers close their runs when training ends. What moves back makes no callback of this
        # round be passed over.
        handler = on_call_stack(CallbackHandler)
        if handler is not None:
            handler.callbacks.insert(0, handler.callbacks.pop(handler.callbacks.index(self)))
            drop_twins(self, handler.callbacks)
        self.pruned, self.plan, self.before, self.after = None, None, {}, {}

    def on_train_end(self, args, state, control, model=None, processing_class=None, **context):
        trainer = on_call_stack(Trainer)
        try:
            self._prune(trainer, args, state, model, processing_class)
        except (LayerProbeError, OSError) as error:  # the training is done and must reach its end
            logger.warning(f"The model was not pruned at the end of training: {error}")
            return
        logs = {
            f"{PREFIX}/{which}/{name}": value
            for which, metrics in (("dense", self.before), ("pruned", self.after))
            for name, value in metrics.items()
        }
        log_numbers(logs, args, state, control, {"model": model, "processing_class": processing_class, **context})

    def _prune(self, trainer: Trainer, args, state, model: nn.Module, processing_class: Any) -> None:
        if args.world_size > 1:
            raise LayerProbeError(f"{args.world_size} processes train it; prune the saved model with prune_layers.")
        if self._score.needs_data and trainer.eval_dataset is None:
            raise LayerProbeError(f"{self.by} is measured on evaluation batches, and the Trainer has no eval_dataset.")
        found = resolve_stack(model, self.stack)
        passes = Passes(found, {self.by: self._score} if self._score.streams else {})
        if trainer.eval_dataset is not None:
            with passes.open(training=False):
                self.before = _evaluate(trainer, model, passes)
        self.plan = self._plan(found, passes)
        folder = Path(args.output_dir) / f"pruned-{state.global_step}"
        push = {}
        if args.push_to_hub:
            push = {"repo_id": f"{trainer.hub_model_id}-pruned", "private": args.hub_private_repo}
            push |= {"push_to_hub": True, "token": args.hub_token, "revision": args.hub_revision}
        tokenizer = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
        with in_own_precision(model):
            self.pruned = prune_layers(
                model, self.plan, tokenizer=tokenizer, output_dir=folder, verify=self.verify, **push
            )
        if trainer.eval_dataset is not None:
            # What a Trainer has put around its model (TRL a head of its own) is not around another one. Compiled graphs
            # know no hooks that come later.
            with torch.compiler.set_stance("force_eager"), bypassed(found, self.plan.remove):
                self.after = _evaluate(trainer, model, None)
        logger.warning(f"{self.plan}; saved in {folder.name}.{_side_by_side(self.before, self.after)}")

    def _plan(self, stack: LayerStack, passes: Passes) -> PruningPlan:
        if not self._score.streams:
            return plan_pruning(stack.model, ratio=self.ratio, num_layers=self.num_layers, by=self.by, stack=stack)
        if passes.missed or not passes.seen:
            raise LayerProbeError(f"{self.by} could not be measured on {passes.missed} of the evaluation's batches.")
        scores = passes.result(self.by)
        if not np.isfinite(scores.values).all():
            bad = np.flatnonzero(~np.isfinite(scores.values)).tolist()
            raise LayerProbeError(f"{self.by} is not finite for layers {bad} of {stack.path!r}.")
        removed, note = least_important(stack, scores, requested(stack.num_layers, self.ratio, self.num_layers))
        plan = plan_pruning(stack.model, remove=removed, stack=stack)
        return replace(plan, by=scores.name, scores=scores.to_dict(), note=note, data={"calibration": scores.data})


class _Counts(TrainerCallback):
    """Takes each evaluated batch as one."""

    def __init__(self, passes: Passes):
        self.passes = passes

    def on_prediction_step(self, args, state, control, **context):
        self.passes.count()


def _evaluate(trainer: Trainer, model: nn.Module, passes: Passes | None) -> dict[str, float]:
    """The Trainer's evaluation of its model, unseen by its callbacks and trackers."""
    twin = copy.copy(trainer)
    for name in ("evaluation_loop", "training_step"):  # what other callbacks have put around the Trainer's own
        vars(twin).pop(name, None)
    twin.state, twin.control = copy.copy(trainer.state), copy.copy(trainer.control)
    twin.state.log_history = []
    twin.callback_handler = CallbackHandler(
        [DefaultFlowCallback(), *([_Counts(passes)] if passes is not None else [])],
        model,
        trainer.processing_class,
        None,
        None,
    )
    twin.model = twin.model_wrapped = model
    metrics = twin.evaluate()
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name.startswith("eval_") and not name.endswith(NOT_RESULTS)
    }


def _side_by_side(before: dict[str, float], after: dict[str, float]) -> str:
    return "".join(f" {name}: {before[name]:.4g} -> {after[name]:.4g}." for name in before if name in after)

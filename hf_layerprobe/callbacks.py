"""Layer scores logged while a `Trainer` works, on the evaluation batches that it runs anyway."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .activations import LayerStream
from .errors import LayerProbeError
from .scores import chance_level, docs_similarity
from .scores.registry import SCORES, Score, get_score
from .scores.run import ALIASES
from .stacks import LayerStack, resolve_stack
from .weights import read_matrices

logger = logging.get_logger(__name__)


class LayerProbeCallback(TrainerCallback):
    """Logs layer scores during training: `Trainer(..., callbacks=[LayerProbeCallback(scores=("avss", "docs"))])`.

    Scores of activations are computed from the evaluation batches that the Trainer runs; there is no second pass, and
    each evaluation starts from nothing. `"docs"` is the similarity of adjacent layers' weights, and needs no
    evaluation. Training itself is not touched: losses and weights are the same to the bit.

    When numbers are logged:
        - `every="eval"`: at each evaluation, all scores.
        - `every="epoch"`, or a number of steps: DOCS at the end of each epoch, or every so many global steps; scores of
          activations at the first evaluation at or after that point.
        - Outside of `train()`, at each evaluation, all scores, whatever `every` is.

    One entry is added to `trainer.state.log_history` and sent to every tracker of `report_to` (progress bars and
    printers are spared), by the main process only and from the batches of that process, under these names:
        - `layerprobe/<score>/layer_07`, the score named as in `scores`. Several evaluation data sets, or another
          `metric_key_prefix`, are told apart by one more part: `layerprobe/<score>/<data set>/layer_07`.
        - `layerprobe/docs/<kind>/mean_neighbour`, and `.../mean_neighbour_excess`, which is 0 at the level of chance.

    Trackers get the names as every metric of a Trainer that is not named `eval_…`: most put `train/` before them.

    A light hook stays on the model from the moment the Trainer is built until [`close`] or until the callback is gone,
    because a Trainer tells nobody that an evaluation is about to begin; it does nothing in training mode. For the same
    reason a callback added with `add_callback` sees its first whole evaluation within or after `train()`; call
    [`open`] to measure an `evaluate()` before that.

    Args:
        scores: Registered scores of activations (avss, avss-published, avss-released, influence) and `"docs"`.
        every: `"eval"`, `"epoch"`, or a number of global steps.
        stack: Path of the stack; the main one by default.
        kinds: Matrices for DOCS, some of q, k, v, o, gate, up, down; all that the model has by default.

    Raises:
        LayerProbeError: Unknown, missing or unsuitable scores, or another `every`. On meeting the model: no such stack,
            or for DOCS no such matrices, or weights that cannot be read.
    """

    _stream: LayerStream | None = None

    def __init__(
        self,
        scores: str | Sequence[str] = ("avss", "docs"),
        every: str | int = "eval",
        *,
        stack: str | None = None,
        kinds: Sequence[str] | None = None,
    ):
        names = [scores] if isinstance(scores, str) else list(scores)
        if not names:
            raise LayerProbeError("LayerProbeCallback got no scores; pass some, for example scores=('avss', 'docs').")
        found = {name: get_score(ALIASES.get(name, name)) for name in names}
        unsuitable = [name for name, score in found.items() if not score.streams and name != "docs"]
        if unsuitable:
            useful = ", ".join(sorted([*ALIASES, *(n for n, s in SCORES.items() if s.streams or n == "docs")]))
            raise LayerProbeError(
                f"LayerProbeCallback cannot log {', '.join(unsuitable)}: a fixed order of the layers, which training "
                f"does not change, or measured by runs of the model's own. Scores that can be logged: {useful}."
            )
        steps = type(every) is int and every > 0
        if not steps and every not in ("eval", "epoch"):
            raise LayerProbeError(f"every is 'eval', 'epoch' or a positive number of steps, got {every!r}.")
        self.every = every
        self.stack = stack
        self.kinds = kinds
        self._docs = "docs" in found
        self._scores = {name: score for name, score in found.items() if score.streams}
        self._training = False
        self._start()

    def _start(self) -> None:
        """Forgets what was reached in an earlier training."""
        self._due = False  # scores of activations wait for an evaluation
        self._reached_at: int | None = None  # the last global steps at which something was ...
        self._docs_at: int | None = None
        self._activations_at: int | None = None

    def open(self, model: nn.Module) -> None:
        """Starts to watch a model; called with the Trainer's model at its first event.

        Raises:
            LayerProbeError: No stack, none at that path, or for DOCS matrices that are missing or cannot be read.
        """
        if self._stream is not None and self._stream.stack.model is model:
            return
        self.close()
        stack = resolve_stack(model, self.stack)
        if self._docs:
            next(read_matrices(stack, self.kinds))  # what cannot be read is refused now, not hours into training
        self._batches = _EvaluationBatches(stack, self._scores)
        self._stream = LayerStream(stack, [self._batches], guest=True)
        if self._scores:
            self._stream.open()

    def close(self) -> None:
        """Takes the hooks off the model; the next event of a Trainer puts them back."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __del__(self):
        # The hooks do not hold the callback, so that it goes with its Trainer, and a model used on is left alone.
        self.close()

    def on_init_end(self, args, state, control, **context):
        self._watch(state, context)

    def on_train_begin(self, args, state, control, **context):
        self._training = True
        self._start()
        if self._watch(state, context):
            self._batches.reset()
            if self._scores and args.eval_strategy == "no":
                logger.warning(
                    f"{', '.join(self._scores)} are measured on evaluation batches, and this training runs no "
                    "evaluation (eval_strategy='no'): they will not be logged."
                )

    def on_step_end(self, args, state, control, **context):
        whole_epoch = self.every == "epoch" and float(state.epoch).is_integer()
        if whole_epoch or (self.every not in ("eval", "epoch") and state.global_step % self.every == 0):
            self._reach(args, state, control, context)

    def on_epoch_end(self, args, state, control, **context):
        # The step before has done it, unless max_steps cut the epoch short.
        if self.every == "epoch":
            self._reach(args, state, control, context)

    def on_train_end(self, args, state, control, **context):
        self._training = False

    def on_prediction_step(self, args, state, control, *, eval_dataloader=None, **context):
        if self._watch(state, context):
            self._batches.count(eval_dataloader)

    def on_predict(self, args, state, control, metrics=None, **context):
        if self._watch(state, context):
            self._batches.reset()

    def on_evaluate(self, args, state, control, metrics=None, **context):
        if not self._watch(state, context):
            return
        step, logs = state.global_step, {}
        always = self.every == "eval" or not self._training
        # Several data sets are several evaluations at one step: each has its activations, the weights are the same.
        if always and not (self._training and self._docs_at == step):
            logs |= self._docs_logs(step)
        if always or self._due or self._activations_at == step:
            logs |= self._batches.logs(_data_set(metrics or {}))
            self._due, self._activations_at = False, step
        self._batches.reset()
        _log(logs, args, state, control, context)

    def _watch(self, state: TrainerState, context: Mapping[str, Any]) -> bool:
        """Whether this process logs; if so, makes sure that the Trainer's present model is watched."""
        if state.is_world_process_zero:
            self.open(context["model"])
        return state.is_world_process_zero

    def _reach(self, args, state, control, context) -> None:
        """An epoch or the given number of steps is complete."""
        if self._reached_at == state.global_step or not self._watch(state, context):
            return
        self._reached_at, self._due = state.global_step, True
        _log(self._docs_logs(state.global_step), args, state, control, context)

    def _docs_logs(self, step: int) -> dict[str, float]:
        if not self._docs:
            return {}
        self._docs_at = step
        try:
            return _neighbour_similarity(self._stream.stack, self.kinds)
        except LayerProbeError as error:  # weights gone to NaN end no training that the user lets go on
            logger.warning(f"DOCS is not logged at step {step}: {error}")
            return {}


class _EvaluationBatches:
    """Takes every pass in eval mode, and keeps those that turn out to have been an evaluation batch.

    A pass counts once the Trainer reports a prediction step after it. Of several passes before that (text generated for
    a metric, or by the user between evaluations) only the last one counts, which is the one that gives the loss.
    """

    def __init__(self, stack: LayerStack, scores: Mapping[str, Score]):
        self.stack = stack
        self.scores = scores
        self.reset()

    def reset(self) -> None:
        self._counted = {name: score.make(self.stack.num_layers) for name, score in self.scores.items()}
        self._latest: dict[str, Any] | None = None  # `_counted` and the latest pass
        self._seen = self._missed = 0
        self._loader: DataLoader | None = None

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        if layer == 0 or self._latest is None:
            self._latest = copy.deepcopy(self._counted)  # a few numbers a layer
        for accumulator in self._latest.values():
            accumulator.update(layer, before, after, mask)

    def count(self, loader: DataLoader | None) -> None:
        """Takes the latest pass as a batch of the evaluation over this loader."""
        if self._loader not in (None, loader):
            self.reset()  # the evaluation before broke off, and its batches are in `_latest` too
        self._loader = loader
        if self._latest is None:
            self._missed += 1
        else:
            self._counted, self._latest = self._latest, None
            self._seen += 1

    def logs(self, data_set: str) -> dict[str, float]:
        """The scores of the evaluation that has just ended; nothing for one that was not seen from its start."""
        if not self.scores:
            return {}
        if self._missed or not self._seen:
            logger.warning(
                f"{', '.join(self.scores)} are not logged: of this evaluation's {self._seen + self._missed} batches, "
                f"{self._missed} could not be measured. A callback added to a Trainer that has not trained misses the "
                "first batch of its first evaluate(): pass it in Trainer(callbacks=[...]), or call its "
                "open(trainer.model) before. The replicas of nn.DataParallel are not seen either; use one process per "
                "device."
            )
            return {}
        width = max(2, len(str(self.stack.num_layers - 1)))
        logs = {}
        for name, accumulator in self._counted.items():
            values = self.scores[name].read(accumulator)[0]
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            if bad:  # such numbers would also make trainer_state.json unreadable
                logger.warning(f"{name} is not logged: it is not finite for layers {bad} of {self.stack.path}.")
                continue
            path = "/".join(["layerprobe", name, *filter(None, [data_set])])
            logs |= {f"{path}/layer_{layer:0{width}}": value for layer, value in enumerate(values.tolist())}
        return logs


def _neighbour_similarity(stack: LayerStack, kinds: Sequence[str] | None) -> dict[str, float]:
    """What `docs(...)` says of adjacent layers, without computing all the other pairs."""
    similarity, excess = defaultdict(list), defaultdict(list)
    previous: dict[str, tuple[int, torch.Tensor]] = {}
    for layer, kind, matrix in read_matrices(stack, kinds):
        before, other = previous.get(kind, (None, None))
        if before == layer - 1 and other.shape[1] == matrix.shape[1]:
            value, chance = docs_similarity(other, matrix), chance_level(len(other), *matrix.shape)
            similarity[kind].append(value)
            excess[kind].append((value - chance) / (1 - chance))
        previous[kind] = layer, matrix
    logs = {}
    for kind in similarity:
        logs[f"layerprobe/docs/{kind}/mean_neighbour"] = float(np.mean(similarity[kind]))
        logs[f"layerprobe/docs/{kind}/mean_neighbour_excess"] = float(np.mean(excess[kind]))
    return logs


def _data_set(metrics: Mapping[str, Any]) -> str:
    """The name of the evaluated data set, from the prefix of its metrics; empty for the only one."""
    # The Trainer itself adds <prefix>_runtime, after the user's metrics.
    prefixes = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")] or ["eval"]
    return "" if prefixes[-1] == "eval" else prefixes[-1].removeprefix("eval_")


def _log(
    logs: dict[str, float],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    context: Mapping[str, Any],
) -> None:
    """Does what `Trainer.log` does, for trackers alone."""
    if not logs:
        return
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append({**logs, "step": state.global_step})
    for tracker in _trackers():
        tracker.on_log(args, state, control, logs=dict(logs), **context)


def _trackers() -> list[TrainerCallback]:
    """The tracker callbacks of the Trainer whose event is being handled.

    A Trainer hands its callbacks neither itself nor each other, and what they return or change is not logged. The
    handler that called us is on the call stack, and it has the list.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            known = tuple(INTEGRATION_TO_CALLBACK.values())
            return [callback for callback in handler.callbacks if isinstance(callback, known)]
        frame = frame.f_back
    return []

"""`LayerProbeCallback`: layer scores of a model while a `Trainer` trains it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from ..errors import LayerProbeError
from ..weights import READERS
from .history import FOLDER, LayerProbeHistory, SnapshotFolder
from .measurement import Measurement, data_set, neighbours, per_layer
from .passes import around
from .schedule import Every, check_every, ends_with_numbers, is_step, never
from .settings import OF_WEIGHTS, activation_scores, check_choice, check_number, drop_twins
from .trackers import log, on_call_stack
from .watched import WatchedModel

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class LayerProbeCallback(TrainerCallback, ExportableState):
    """Logs layer scores during training: `Trainer(..., callbacks=[LayerProbeCallback(scores=("avss", "docs"))])`.

    Scores of activations are computed from the evaluation batches that the Trainer runs, or from some of its training
    batches; there is no pass of their own. DOCS and drift are of the weights. Training itself is not touched: losses and
    weights are the same to the bit, and hooks are on the model only while it evaluates, or within a sampled step.

    When numbers are logged:
        - `every="eval"`: at each evaluation, all scores.
        - `every="epoch"`, a number of steps, or a list of steps: those of weights then; scores of activations at the
          first evaluation at or after that point.
        - Outside of `train()`, at each evaluation, all scores, whatever `every` is.

    Where they go: one entry in `trainer.state.log_history` and every tracker of `report_to` (progress bars and printers
    are spared), with histograms and pictures of layers × steps for TensorBoard, Trackio, W&B and MLflow; and a folder
    `layerprobe`, from which [`LayerProbeHistory`] reads the run back. The main process writes, from the batches of all.
    Names, with layers numbered as at the start of the run:
        - `layerprobe/<score>/layer_07`, the score named as in `scores`.
        - `layerprobe/docs/<kind>/mean_neighbour`, and `…/mean_neighbour_excess`, which is 0 at the level of chance.
        - `layerprobe/drift/norm/layer_07` and `layerprobe/drift/docs/layer_07`, the means over the kinds.
        - One more part after the score tells apart: another stack than the main one (its path), several evaluation data
          sets or another `metric_key_prefix`, `training` batches, and `merged` or `base` weights of a PEFT model.

    Trackers get the names as every metric of a Trainer that is not named `eval_…`: most put `train/` before them.

    A callback added with `add_callback` to a Trainer that has not trained sees nothing of a first `evaluate()`, because
    no event precedes it; call [`open`] before.

    Args:
        scores: Registered scores of activations (avss, influence, angular, …; see [`score_layers`]), `"docs"`, and
            `"drift"`: each layer against its own start, by relative norm and by DOCS (our own definition).
        every: `"eval"`, `"epoch"`, a number of global steps, or a list of global steps.
        stack: Path of the stack; the main one by default.
        kinds: Matrices for DOCS and drift, some of q, k, v, o, gate, up, down; all that the model has by default.
        maps: Compare all pairs of layers by DOCS instead of adjacent ones; trackers get the maps as pictures.
        sample: Vectors of each matrix that DOCS and drift match, always the same ones; `None` for all.
        max_seconds: How long DOCS may take at a step, and drift as much again: matrices that would take longer, as far as
            those before tell, are left out, which the log says; NaN in the history. `None` for no bound.
        batches: `"evaluation"`, or `"training"`: those of the steps that `every` names.
        adapters: In a PEFT model, `"merged"` reads each matrix with its adapters merged on the fly, `"base"` without.
        output_dir: Where the folder `layerprobe` goes; the Trainer's `output_dir` by default.

    Raises:
        LayerProbeError: Unknown, missing or unsuitable scores, or another value that an argument does not take. On
            meeting the model: no such stack, or for DOCS and drift no such matrices.
    """

    scores: str | Sequence[str] = ("avss", "docs")
    every: Every = "eval"
    _: KW_ONLY
    stack: str | None = None
    kinds: Sequence[str] | None = None
    maps: bool = False
    sample: int | None = 128
    max_seconds: float | None = 10.0
    batches: str = "evaluation"
    adapters: str = "merged"
    output_dir: str | Path | None = None

    def __post_init__(self):
        self.scores = (self.scores,) if isinstance(self.scores, str) else tuple(self.scores)
        self.every = check_every(self.every)
        self._activations = activation_scores(self.scores)
        check_choice("batches", self.batches, ("evaluation", "training"))
        check_choice("adapters", self.adapters, READERS)
        check_number("sample", self.sample, 2)
        check_number("max_seconds", self.max_seconds, 0)
        self._watched: WatchedModel | None = None
        self._undo: list = []
        self._joined: Callable[[], Trainer | None] = _nobody  # a weak reference to the Trainer
        self._training = self._stepping = False
        self._layers: list[int] | None = None  # the layers' numbers, where a run goes on
        self._forget()

    def _forget(self) -> None:
        """Forgets what was reached in an earlier training."""
        self._due = False  # scores of activations wait for an evaluation
        self._reached_at: int | None = None  # the last global steps at which something was ...
        self._weights_at: int | None = None
        self._activations_at: int | None = None
        self._past: dict[str, list[np.ndarray]] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments, and what is needed to go on."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        arguments["output_dir"] = None if self.output_dir is None else str(self.output_dir)
        layers = self._watched.layers if self._watched is not None else self._layers
        return {"args": arguments, "attributes": {"_due": self._due, "_layers": layers}}

    def open(self, trainer: Trainer) -> None:
        """Starts to watch a Trainer, as happens by itself when it is built with the callback or trains.

        Raises:
            LayerProbeError: The model has no stack, none at that path, or no matrices for DOCS.
        """
        if self._joined() is not trainer:
            self.close()
            if self._activations:
                self._undo = [
                    around(trainer, "evaluation_loop", self._around_evaluation),
                    around(trainer, "training_step", self._around_training_step),
                ]
            self._joined = weakref.ref(trainer)
        self._watch(trainer.model)

    def close(self) -> None:
        """Lets go of the Trainer and its model."""
        for undo in self._undo:
            undo()
        self._undo, self._joined, self._watched = [], _nobody, None

    # Events, in the order of a run

    def on_init_end(self, args, state, control, **context):
        self._join(context)

    def on_train_begin(self, args, state, control, **context):
        due, self._training = self._due, True
        self._forget()
        self._due = due and state.global_step > 0
        self._join(context)
        self._say_what_will_not_come(args, state)
        if state.global_step and isinstance(state.stateful_callbacks, dict):
            # A checkpoint from before the callback was added has no place for its state, and the Trainer wants one.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.is_world_process_zero:
            folder = self._folder(args)
            if done := folder.begin(state.global_step):
                logger.warning(f"{folder.path}: {done}.")
            if state.global_step and any(folder.path.glob("step-*")):
                history = LayerProbeHistory.load(folder.path)
                self._past = {name: [neighbours(row) for row in rows] for name, rows in history.values.items()}
        if self._watched is not None and "drift" in self.scores:
            self._watched.take_start(self._folder(args).start, state, self.sample)

    def on_step_begin(self, args, state, control, **context):
        if self.batches == "training" and self._activations and self._watch(context["model"]):
            self._stepping = ends_with_numbers(self.every, state.global_step + 1, args, state, context)
            if self._stepping:
                self._watched.passes.reset()

    def on_substep_end(self, args, state, control, **context):
        if self._stepping:
            self._watched.passes.count()

    def on_step_end(self, args, state, control, **context):
        name = type(self).__name__
        if isinstance(state.stateful_callbacks.get(name), list):
            state.stateful_callbacks[name] = []  # the Trainer appends the state of each at every save
        found = []
        if self._stepping:
            self._stepping = False
            self._watched.passes.count()
            found += self._of_activations("training", state)
        if is_step(self.every, state.global_step) or (self.every == "epoch" and float(state.epoch).is_integer()):
            found += self._reach(args, state, context)
        self._emit(found, args, state, control, context)

    def on_epoch_end(self, args, state, control, **context):
        # The step before has done it, unless max_steps cut the epoch short.
        if self.every == "epoch":
            self._emit(self._reach(args, state, context), args, state, control, context)

    def on_prediction_step(self, args, state, control, *, eval_dataloader=None, **context):
        self._join(context)
        if self._watched is not None and self.batches == "evaluation":
            self._watched.passes.count(eval_dataloader)

    def on_predict(self, args, state, control, metrics=None, **context):
        if self._watched is not None:
            self._watched.passes.reset()

    def on_evaluate(self, args, state, control, metrics=None, **context):
        if not self._watch(context["model"]):
            return
        step, found = state.global_step, []
        always = self.every == "eval" or not self._training
        # Several data sets are several evaluations at one step: each has its activations, the weights are the same.
        if always and not (self._training and self._weights_at == step):
            found += self._of_weights(args, state)
        if self.batches == "evaluation" and (always or self._due or self._activations_at == step):
            found += self._of_activations(data_set(metrics or {}), state)
            self._due, self._activations_at = False, step
        self._watched.passes.reset()
        self._emit(found, args, state, control, context)

    def on_train_end(self, args, state, control, **context):
        self._training = self._stepping = False
        if self._due and self.batches == "evaluation" and self._activations and args.eval_strategy != "no":
            logger.warning(f"{', '.join(self._activations)}: no evaluation came after step {self._reached_at}.")

    # What the events do

    def _join(self, context: Mapping[str, Any]) -> None:
        handler, trainer = on_call_stack(CallbackHandler), on_call_stack(Trainer)
        if handler is not None:
            drop_twins(self, handler.callbacks)
        if trainer is not None and self._joined() is not trainer:
            self.open(trainer)
        else:
            self._watch(context["model"])

    def _watch(self, model) -> bool:
        """Makes sure that the Trainer's present model, with its present layers, is the one watched."""
        if self._watched is not None and self._watched.is_of(model):
            return True
        before = self._watched
        try:
            self._watched = WatchedModel(
                model,
                self.stack,
                self._activations,
                kinds=self.kinds,
                needs_weights=any(name in OF_WEIGHTS for name in self.scores),
                adapters=self.adapters,
                before=before,
                layers=self._layers,
            )
        except LayerProbeError as error:
            if before is None:
                raise
            logger.warning_once(f"The model was replaced, and the new one is not watched: {error}")
            return False
        self._layers = self._watched.layers
        if before is not None and not before.shares_layers(self._watched):
            logger.warning(f"The model was replaced; from now on the new {type(model).__name__} is watched.")
        return True

    @contextmanager
    def _around_evaluation(self) -> Iterator[None]:
        trainer = self._joined()
        # A run that goes on with restored callbacks has put a new one in the place of this one.
        present = any(callback is self for callback in trainer.callback_handler.callbacks)
        if self.batches != "evaluation" or not present or not self._watch(trainer.model):
            yield
            return
        self._watched.passes.reset()
        with self._watched.passes.open(training=False):
            yield

    @contextmanager
    def _around_training_step(self) -> Iterator[None]:
        if not self._stepping:
            yield
            return
        with self._watched.passes.open(training=True, compiled=self._joined().args.torch_compile):
            yield

    def _say_what_will_not_come(self, args, state) -> None:
        why = never(self.every, args, state)
        if why is not None:
            logger.warning(f"LayerProbeCallback will log nothing in this training: {why}.")
        elif self._activations and self.batches == "evaluation" and args.eval_strategy == "no":
            logger.warning(
                f"{', '.join(self._activations)} are measured on evaluation batches, and this training runs no evaluation "
                "(eval_strategy='no'): they will not be logged. batches='training' measures training batches."
            )

    def _reach(self, args, state, context: Mapping[str, Any]) -> list[Measurement]:
        """An epoch or the given number of steps is complete."""
        if self._reached_at == state.global_step or not self._watch(context["model"]):
            return []
        self._reached_at, self._due = state.global_step, bool(self._activations) and self.batches == "evaluation"
        return self._of_weights(args, state)

    def _of_weights(self, args, state) -> list[Measurement]:
        self._weights_at, found = state.global_step, []
        if "docs" in self.scores:
            found += self._watched.docs(state, maps=self.maps, sample=self.sample, max_seconds=self.max_seconds)
        if "drift" in self.scores:
            found += self._watched.drift(state, self._folder(args).start, max_seconds=self.max_seconds)
        return found

    def _of_activations(self, data: str, state) -> list[Measurement]:
        """The scores of the passes that have just ended; nothing for an evaluation that was not seen from its start."""
        if not self._activations:
            return []
        passes, found = self._watched.passes, []
        passes.add_up()
        if not passes.missed and not passes.seen:
            logger.warning(f"{', '.join(self._activations)} are not logged: there were no batches.")
            return []
        if passes.missed:
            logger.warning(
                f"{', '.join(self._activations)} are not logged: of {passes.seen + passes.missed} batches, {passes.missed} "
                "could not be measured. A callback added to a Trainer that has not trained misses its first evaluate(): "
                "pass it in Trainer(callbacks=[...]), or call its open(trainer) before. The replicas of nn.DataParallel "
                "are not seen either; use one process per device."
            )
            return []
        for name in passes.scores:
            try:
                values = passes.result(name).values
            except LayerProbeError as error:  # no reason to end a training
                logger.warning_once(f"{name} is not logged: {error}")
                continue
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            if bad:
                logger.warning(
                    f"{name} is not logged: it is not finite for layers {bad} of {self._watched.stack.path}."
                )
                continue
            path = "/".join([name, *self._watched.label, *filter(None, [data])])
            found.append(per_layer(path, values, self._watched.layers, self._watched.width, batches=passes.seen))
        return found

    def _emit(self, found: list[Measurement], args, state, control, context: Mapping[str, Any]) -> None:
        if not found or not state.is_world_process_zero:
            return
        log(found, self._past, args, state, control, context)
        watched, folder = self._watched, self._folder(args)
        try:
            # After training, the weights need not be those of that step: load_best_model_at_end.
            folder.add(
                state.global_step, state.epoch, watched.stack.path, watched.layers, found, replace=self._training
            )
        except OSError as error:  # a full disk is no reason to end a training that does not write
            logger.warning_once(f"Snapshots are not written to {folder.path}: {error}")

    def _folder(self, args) -> SnapshotFolder:
        return SnapshotFolder(Path(args.output_dir if self.output_dir is None else self.output_dir) / FOLDER)


def _nobody() -> None:
    """As a weak reference to a Trainer that is gone; can be pickled, so that a callback can be sent to other processes."""

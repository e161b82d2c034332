"""The stack that a callback watches: its layers by number, its passes and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerState
from transformers.utils import logging

from ..activations.processes import of_first
from ..errors import LayerProbeError
from ..scores.bounded import TimeSlice
from ..scores.drift import Start, save_start, start_of
from ..scores.registry import Score
from ..stacks import LayerStack, find_stacks, resolve_stack
from ..stacks.adapters import base_of
from ..weights import LiveWeights, is_sharded
from .measurement import Measurement
from .passes import Passes
from .weights_now import docs_now, drift_now

logger = logging.get_logger(__name__)
T = TypeVar("T")


class WatchedModel:
    """One model with its present layers; another model, or other layers, need another one.

    Args:
        model: The Trainer's model.
        stack: Path of the stack, or the main one.
        activations: Name → score of activations.
        kinds: Matrices for the scores of weights.
        needs_weights: Whether there are any.
        adapters: How weights with adapters are read.
        before: What was watched until now; layers that it knew keep their numbers.
        layers: Numbers of the layers, if none is known and they are as many.

    Attributes:
        stack: The stack.
        layers: The number that each layer had at the start of the run.
        label: Parts of the names that tell this stack and these weights from others.
        width: Digits of a layer's number.

    Raises:
        LayerProbeError: No stack, none at that path, or matrices that it does not have; FSDP1.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: str | None,
        activations: Mapping[str, Score],
        *,
        kinds: Sequence[str] | None,
        needs_weights: bool,
        adapters: str,
        before: WatchedModel | None = None,
        layers: Sequence[int] | None = None,
    ):
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise LayerProbeError(
                "FSDP1 flattens the matrices of each layer into one vector, of which a process holds a piece. Use FSDP2 "
                "(fsdp_config={'version': 2})."
            )
        self.stack: LayerStack = resolve_stack(model, stack)
        self._present = list(self.stack.layers)
        self._numbers: WeakKeyDictionary[nn.Module, int] = before._numbers if before else WeakKeyDictionary()
        if not all(layer in self._numbers for layer in self._present):
            fits = layers is not None and len(layers) == len(self._present)
            self._numbers = WeakKeyDictionary(
                zip(self._present, layers if fits else range(len(self._present)), strict=True)
            )
        self.layers = [self._numbers[layer] for layer in self._present]
        self.width = max(2, len(str(max(self._numbers.values()))))
        if before is not None and before.shares_layers(self):
            self.width = before.width
        main = find_stacks(model)[0].path == self.stack.path
        self.label = [] if main else [self.stack.path]
        self.passes = Passes(self.stack, activations)
        tuned = any(hasattr(module, "base_layer") for layer in self._present for module in layer.modules())
        self.weights_label = [*self.label, *([adapters] if tuned else [])]
        self.weights = LiveWeights(self.stack, kinds, adapters=adapters) if needs_weights else None
        for note in self.weights.notes if self.weights else ():
            logger.warning(f"{self.stack.path}: {note}")

    def is_of(self, model: nn.Module) -> bool:
        now = self.stack.layers if self.stack.model is base_of(model) else ()
        return len(now) == len(self._present) and all(a is b for a, b in zip(now, self._present, strict=True))

    def shares_layers(self, other: WatchedModel) -> bool:
        return any(layer in self._numbers for layer in other._present)

    def take_start(self, path: Path, state: TrainerState, sample: int | None) -> None:
        """Keeps the weights that drift is measured from, or finds those that an interrupted run has kept."""
        if self.weights is None or not self._takes_part(state):
            return
        if state.global_step > 0:
            if self._of_main(path.is_file()):
                return
            logger.warning(f"Drift is measured from step {state.global_step} on: {path} is not there.")
        try:
            rows = start_of(self.weights, sample=sample)
            if state.is_world_process_zero:
                save_start(rows, path, step=state.global_step, sample=sample)
        except (LayerProbeError, OSError) as error:
            logger.warning(f"Drift will not be logged: {error}")

    def docs(
        self, state: TrainerState, *, maps: bool, sample: int | None, max_seconds: float | None
    ) -> list[Measurement]:
        """DOCS now; nothing on processes that need not take part, or where the weights cannot be read."""
        return self._measured(
            "DOCS",
            state,
            lambda slice: docs_now(self.weights, self.weights_label, slice, maps=maps, sample=sample),
            max_seconds,
        )

    def drift(self, state: TrainerState, path: Path, *, max_seconds: float | None) -> list[Measurement]:
        """Drift now from the start kept at `path`, in the same way."""

        def measure(time_slice):
            start = refusal = None
            if state.is_world_process_zero:
                try:
                    start = Start(path)
                except LayerProbeError as error:
                    refusal = str(error)
            if refusal := self._of_main(refusal):
                raise LayerProbeError(refusal)
            return drift_now(self.weights, start, self.layers, self.weights_label, time_slice, self.width)

        return self._measured("Drift", state, measure, max_seconds)

    def _measured(self, what: str, state: TrainerState, measure: Callable[[TimeSlice], list[Measurement]], seconds):
        if self.weights is None or not self._takes_part(state):
            return []
        try:
            return measure(TimeSlice(seconds, together=self._sharded))
        except LayerProbeError as error:  # weights gone to NaN end no training that the user lets go on
            logger.warning(f"{what} is not logged at step {state.global_step}: {error}")
            return []

    @property
    def _sharded(self) -> bool:
        return is_sharded(self.stack.layers[0])

    def _of_main(self, found: T) -> T:
        """What the main process has found, since all have to gather the weights, or none."""
        return of_first(found) if self._sharded else found

    def _takes_part(self, state: TrainerState) -> bool:
        """The main process alone; all where each holds a part of the weights."""
        return state.is_world_process_zero or self._sharded

"""One model type: a tiny random model of it, pruned in several ways, each reloaded from disk and compared."""

from __future__ import annotations

import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_layerprobe import LayerProbeError, LayerStack, PruningError, find_stacks, prune_layers
from hf_layerprobe.surgery.inputs import example_inputs

from .compare import TOLERANCE, difference, entries_of_kept, outputs, without
from .tiny_config import tiny_configs
from .types import classes_of

LARGEST = 120e6  # parameters
LONGEST = 40  # seconds of computing for finding inputs, on the slowest of processors; four times as much for pruning


class TooLong(BaseException):
    """Not an Exception: nothing that tries a model may take it for the model's."""


def try_type(model_type: str) -> dict[str, Any]:
    """What became of one model type.

    Returns:
        `class`, `outcome` and `stacks`; `why` where the outcome is not about pruning. The outcome is one of `"pruned"`
        (some stack has kept sets that came out equal), `"refused"`, `"no stack"`, `"not run"`, `"not built"`, and what
        must not be: `"wrong"`, `"crashed"`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Runnable()
        try:
            with at_most(LONGEST):
                found.search(model_type)
        except TooLong:
            found.why = found.why or f"no inputs were found in {LONGEST} s of computing"
        except Exception as error:  # only a LayerProbeError is foreseen
            return {"class": found.name, "outcome": "crashed", "why": f"{type(error).__name__}: {error}", "stacks": []}
        if found.model is None or found.why:
            outcome = "not built" if found.model is None else "not run"
            return {"class": found.name, "outcome": outcome, "why": _short(found.why), "stacks": []}
        try:
            with at_most(4 * LONGEST):
                return _try_stacks(found.model)
        except TooLong:  # says nothing about the library
            why = f"not done in {4 * LONGEST} s of computing"
            return {"class": found.name, "outcome": "not run", "why": why, "stacks": []}
        except Exception as error:
            return {"class": found.name, "outcome": "crashed", "why": f"{type(error).__name__}: {error}", "stacks": []}


def _try_stacks(model: PreTrainedModel) -> dict[str, Any]:
    record: dict[str, Any] = {"class": type(model).__name__, "outcome": "no stack", "stacks": []}
    stacks = find_stacks(model)
    for stack in stacks:
        record["stacks"].append(_try_stack(model, stack))
    if len({stack.num_layers for stack in stacks}) == 1 < len(stacks) and not _any_equal(record):
        # Where no stack can lose layers alone, all may together (the towers of BridgeTower).
        paths, number = " and ".join(stack.path for stack in stacks), stacks[0].num_layers
        outcome, _ = _try_set(model, stacks, (0,))
        record["stacks"].append({"path": paths, "layers": number, "sets": {_key((0,)): outcome}})
    found = [outcome for stack in record["stacks"] for outcome in stack["sets"].values()]
    if record["stacks"]:
        record["outcome"] = "pruned" if _any_equal(record) else "refused"
    for bad in ("wrong", "crashed"):
        if any(outcome.startswith(bad) for outcome in found):
            record["outcome"] = bad
    return record


def _any_equal(record: dict[str, Any]) -> bool:
    return any(outcome.startswith("equal") for stack in record["stacks"] for outcome in stack["sets"].values())


class Runnable:
    """The first tiny model of a type that runs; else one that does not, and why."""

    def __init__(self):
        self.model: PreTrainedModel | None = None
        self.why: str | None = "no tiny config could be made"

    @property
    def name(self) -> str | None:
        return type(self.model).__name__ if self.model is not None else None

    def search(self, model_type: str) -> None:
        config_class, classes = classes_of(model_type)
        if config_class is None or not classes:
            self.why = "Transformers names no model class that it has"
            return
        for model_class in classes[:3]:
            for config in tiny_configs(config_class):
                if (model := self._built(model_class, config)) is None:
                    continue
                try:
                    stacks = find_stacks(model)
                    example_inputs(model, stacks[0].layers if stacks else ())
                except LayerProbeError as error:
                    if self.model is None:
                        self.model, self.why = model, str(error)
                    continue
                self.model, self.why = model, None
                return

    def _built(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(config).parameters())
            if size <= LARGEST:
                torch.manual_seed(0)
                return _mattering(model_class(config))
            problem = f"the smallest config that could be made has {size / 1e6:.0f} M parameters"
        except Exception as error:  # whatever a constructor raises
            problem = f"{type(error).__name__}: {error}".strip()
        if self.model is None:
            self.why = problem
        return None


def _mattering(model: PreTrainedModel) -> PreTrainedModel:
    """With random weights such that every layer, norm, bias and gate makes a difference, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Fixed tables of positions are computed anew where a model is loaded.
            if parameter.is_floating_point() and parameter.requires_grad:
                if parameter.dim() >= 2:
                    parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model.eval()


def _try_stack(model: PreTrainedModel, stack: LayerStack) -> dict[str, Any]:
    number = stack.num_layers
    # First, inner and last at once; each by itself where they cannot all go.
    together = [(0, number // 2, number - 1)] if number > 3 else []
    apart = [(1, 3) if number > 4 else (1,), (0,), (number - 1,)]
    record: dict[str, Any] = {"path": stack.path, "layers": number, "sets": {}}
    suggested = None
    for removed in dict.fromkeys((*together, *apart)):
        outcome, error = _try_set(model, [stack], removed)
        record["sets"][_key(removed)] = outcome
        if error is not None and error.nearest and suggested is None:
            suggested = tuple(i for i in range(number) if i not in error.nearest[0])
        if removed in together and outcome == "equal":
            break
    if suggested and _key(suggested) not in record["sets"]:
        # What a refusal recommends has to work.
        outcome, _ = _try_set(model, [stack], suggested)
        record["sets"][_key(suggested)] = outcome
    return record


def _short(text: str) -> str:
    """Without the lists of everything that was tried."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:299]}…"


def _key(removed: tuple[int, ...]) -> str:
    return ", ".join(map(str, removed))


def _try_set(
    model: PreTrainedModel, stacks: list[LayerStack], removed: tuple[int, ...]
) -> tuple[str, PruningError | None]:
    """`"equal"`, or the reason after `"refused: "`, `"wrong: "` or `"crashed: "`."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            prune_layers(model, remove={stack.path: removed for stack in stacks}, output_dir=Path(folder, "pruned"))
            reloaded = type(model).from_pretrained(Path(folder, "pruned")).eval()
    except PruningError as error:
        return _short(f"refused: {error}"), error
    except LayerProbeError as error:
        return _short(f"refused: {error}"), None
    except Exception as error:
        return _short(f"crashed: {type(error).__name__}: {error}"), None
    lists = [each.layers for stack in stacks for each in (stack, *stack.siblings)]
    try:
        part, inputs = _running(model, stacks[0].path, [stack.layers[i] for stack in stacks for i in removed])
        with without(lists, removed):
            expected = outputs(model.get_submodule(part), inputs)
        found = outputs(reloaded.get_submodule(part), inputs)
    except AssertionError as error:
        return f"equal to the library's own check alone: {error}", None
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}", None
    largest = difference(entries_of_kept(expected, found, stacks[0].num_layers, removed), found)
    return ("equal" if largest <= TOLERANCE else f"wrong: differs by {largest:.1e}"), None


def _running(model: PreTrainedModel, path: str, layers: list[nn.Module]) -> tuple[str, dict[str, torch.Tensor]]:
    """The outermost model around a stack that runs all of some layers, by its path, and what it runs on."""
    names = path.split(".")
    for depth in range(len(names)):
        part = ".".join(names[:depth])
        if isinstance(found := model.get_submodule(part), PreTrainedModel):
            with suppress(LayerProbeError):
                return part, example_inputs(found, layers)
    raise AssertionError("no inputs are known on which these layers run")


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Seconds of computing, so that a busy machine does not change what is found."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

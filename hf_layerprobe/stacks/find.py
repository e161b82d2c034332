"""Finds the repeated layers of any model by structure; the config is consulted only to rank them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import LayerProbeError
from .adapters import base_of
from .admissible import check
from .bind import COUNT_NAME, ConfigBinding, bind
from .taps import nodes


@dataclass(eq=False)
class LayerStack:
    """One list of repeated layers inside a model.

    Attributes:
        model: The model that holds the stack.
        path: Dotted module path of the list, such as `"model.layers"`.
    """

    model: nn.Module
    path: str

    @property
    def layers(self) -> nn.ModuleList:
        """The live layers, in depth order."""
        return self.model.get_submodule(self.path)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def owner(self) -> nn.Module:
        """The nearest `PreTrainedModel` around the stack (a tower, the language model), or the model itself."""
        parts = self.path.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            owner = self.model.get_submodule(".".join(parts[:depth]))
            if isinstance(owner, PreTrainedModel):
                return owner
        return self.model

    @cached_property
    def binding(self) -> ConfigBinding:
        """The config field that sets the number of layers.

        Raises:
            LayerProbeError: No field of the config, edited alone, changes the length of this stack alone.
        """
        return bind(self.model, self.path, self.num_layers)

    def check(self, keep: Iterable[int]) -> None:
        """Checks, without moving any data, that the model can be saved with only these layers and stay what it is.

        The model of the edited config is built on the meta device and compared with the original, layer by layer. What a
        layer computes from other layers' states shows only when it runs: the comparison after pruning looks at that.

        Args:
            keep: Layers to keep (0-based).

        Raises:
            PruningError: They cannot be kept alone; the message says why, and `.nearest` has the kept sets most like
                these that can.
        """
        check(self, keep)

    @property
    def siblings(self) -> list[LayerStack]:
        """Other lists that the same config field drives, so that they lose the same entries: none for most stacks."""
        try:
            return [LayerStack(self.model, path) for path in self.binding.siblings]
        except LayerProbeError:
            return []

    @property
    def config_path(self) -> str:
        """Dotted path of that field, such as `"num_hidden_layers"` or `"text_config.num_hidden_layers"`."""
        return self.binding.path

    def __repr__(self) -> str:
        return f"LayerStack(path={self.path!r}, num_layers={self.num_layers}, layer={type(self.layers[0]).__name__})"


def find_stacks(model: nn.Module) -> list[LayerStack]:
    """Finds every list of repeated layers, the main one first.

    A stack is an `nn.ModuleList` of at least two layers of one family that hold matrices of their own, or an
    `nn.Sequential` of what Transformers marks as layers (CvT). Lists inside a layer (experts, the sublayers of a T5 block),
    convolutional feature extractors, stages of different widths and lists of plain `torch.nn` modules are not stacks. Stacks that belong to the text model come first, then the model's own order: the encoder of a
    sequence-to-sequence model before its decoder, the language model of a vision-language model before its towers.

    Args:
        model: Any `PreTrainedModel`, or a module that wraps one; of a `PeftModel`, the stacks are those of the model in it.

    Returns:
        The stacks; an empty list for a model that has none (one shared layer, as in ALBERT, is not a stack).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_stacks expects a model (torch.nn.Module), got {type(model).__name__}.")
    model = base_of(model)
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}

    def is_marked(layers: nn.Module) -> bool:
        return all(isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in named for layer in layers)

    lists = [
        (path, module)
        for path, module in _outermost_lists(model, _stage_sizes(model))
        if isinstance(module, nn.ModuleList) or is_marked(module)
    ]
    found = [path for path, module in lists if _is_stack(module)]
    hinted = [path for path in found if is_marked(model.get_submodule(path))]
    # Prediction heads and projections are repeated lists too; where Transformers marks the real layers, trust the mark.
    paths = hinted or found
    return [LayerStack(model, path) for path in sorted(paths, key=lambda path: not _in_text_model(model, path))]


def resolve_stack(model: nn.Module, stack: str | LayerStack | None = None) -> LayerStack:
    """The stack a caller means: the main one by default, else by path.

    Raises:
        LayerProbeError: The model has no stack, or none at that path.
    """
    if isinstance(stack, LayerStack):
        # A stack found on another copy of the model names the same place in this one.
        stack = stack.path
    stacks = find_stacks(model)
    if not stacks:
        raise LayerProbeError(_why_no_stack(model))
    if stack is None:
        return stacks[0]
    for candidate in stacks:
        if candidate.path == stack:
            return candidate
    known = ", ".join(f"{s.path!r} ({s.num_layers} layers)" for s in stacks)
    raise LayerProbeError(f"{type(model).__name__} has no stack {stack!r}; its stacks are {known}.")


def _outermost_lists(module: nn.Module, stage_sizes: set[tuple[int, ...]], prefix: str = ""):
    """Every list of modules that is not inside a stack already found; the stages of a pyramid are no stack."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and not _are_stages(child, stage_sizes):
            yield path, child
            if isinstance(child, nn.ModuleList) and _is_stack(child):
                continue
        yield from _outermost_lists(child, stage_sizes, path)


def _stage_sizes(model: nn.Module) -> set[tuple[int, ...]]:
    """Numbers of layers of the stages of every pyramid that the config describes, such as (2, 2, 6, 2)."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return set()
    return {
        tuple(value)
        for _, node in nodes(config)
        for name, value in vars(node).items()
        if COUNT_NAME.search(name) and isinstance(value, (list, tuple)) and value and {type(n) for n in value} == {int}
    }


def _are_stages(modules: nn.ModuleList, stage_sizes: set[tuple[int, ...]]) -> bool:
    """Whether a list holds stages, each with a list of layers of the length that the config gives it."""
    # An entry may be None: Informer has no convolution after its last layer.
    stages = [stage.children() if stage is not None else () for stage in modules]
    inner = [[len(each) for each in children if isinstance(each, nn.ModuleList)] for children in stages]
    return any(
        len(sizes) == len(inner) and all(size in lengths for size, lengths in zip(sizes, inner, strict=True))
        for sizes in stage_sizes
    )


def _is_stack(layers: nn.Module) -> bool:
    if len(layers) < 2 or any(layer is None or type(layer).__module__.startswith("torch.nn") for layer in layers):
        return False
    one_family = len({type(layer) for layer in layers}) == 1 or all(
        isinstance(layer, GradientCheckpointingLayer) for layer in layers
    )
    distinct = len({id(layer) for layer in layers}) == len(layers)
    return one_family and distinct and all(_holds_matrices(layer) for layer in layers) and _are_alike(layers)


def _are_alike(layers: nn.Module) -> bool:
    """Whether layers of one class have any tensor in common, by its name and shape.

    Stages of different widths have none (the encoder of DAC), nor have wrappers around attentions and MLPs in turn (LeViT).
    """
    shapes = [{(name, _shape(tensor)) for name, tensor in layer.named_parameters()} for layer in layers]
    return len({type(layer) for layer in layers}) > 1 or bool(set.intersection(*shapes))


def _holds_matrices(layer: nn.Module) -> bool:
    """Whether the layer mixes features by matrices rather than by convolutions and tables alone."""
    if any(hasattr(module, "qweight") for module in layer.modules()):  # GPTQ and AWQ have buffers in their place
        return True
    return any(
        len(_shape(parameter)) >= 2
        for module in layer.modules()
        if not isinstance(module, (_ConvNd, nn.Embedding, ParametrizationList))
        for parameter in module.parameters(recurse=False)
    )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the parameter itself is empty


def _in_text_model(model: nn.Module, path: str) -> bool:
    """Whether the nearest enclosing `PreTrainedModel` is configured by the model's text config."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    try:
        text_class = type(config.get_text_config())
    except ValueError:  # several text models (encoder and decoder of different kinds): none comes first
        return True
    owner = LayerStack(model, path).owner
    return not isinstance(owner, PreTrainedModel) or type(owner.config) is text_class


def _why_no_stack(model: nn.Module) -> str:
    passes = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    reason = f"{type(model).__name__} has no repeated list of layers"
    if isinstance(passes, int) and passes > 1:
        return (
            f"{reason}: its config counts {passes} layers, but they share their weights or are not kept in a ModuleList "
            f"of two or more (ALBERT runs one layer {passes} times). There is nothing to compare or to remove; a model "
            "that shares one layer is made shallower by lowering that count in its config."
        )
    return f"{reason} (a ModuleList of two or more layers of one kind); there is nothing to compare or to remove."

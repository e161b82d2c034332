"""Reads the matrices of a checkpoint from its files, one at a time, without ever building the model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from ..errors import LayerProbeError
from ..loading import load_class
from ..stacks import LayerStack, resolve_stack
from .conversion import find_sources, load_parameter
from .naming import NamedWeight, find_modules
from .quantised import find_quantisation, read_float
from .read import check_readable, matrix_parts, present_kinds
from .shards import Shards


def open_checkpoint(
    name_or_path: str | Path, *, stack: str | LayerStack | None = None, kinds: Sequence[str] | None = None
) -> Checkpoint:
    """Opens a checkpoint to read its matrices from the files; no weights are loaded yet.

    Args:
        name_or_path: A local folder with `config.json` and safetensors, or a Hub id (the only case that may use the
            network). Of a Hub checkpoint in several files, only those with matrices that are asked for are fetched.
        stack: Path of the stack; the main one by default.
        kinds: Some of q, k, v, o, gate, up, down; all that the model has and that can be read by default.

    Raises:
        LayerProbeError: No checkpoint there, or none in safetensors; its class is not in Transformers; it has no stack;
            it is quantised with anything but 8-bit floats; matrices of the model are not in the files.
    """
    name = str(name_or_path)
    is_folder = Path(name).is_dir()
    try:
        config, model_class = load_class(name)
    except OSError as error:
        place = "" if is_folder else " (there is no such folder, so it was taken as a Hub id)"
        raise LayerProbeError(f"Cannot open the checkpoint {name!r}{place}: {error}") from error
    quantisation = find_quantisation(config)
    with torch.device("meta"):
        model = model_class(config)
    found = resolve_stack(model, stack)
    shards = Shards(name)
    checkpoint = Checkpoint(found, shards, *present_kinds(found, kinds), quantisation.get("weight_block_size"))
    if is_folder:  # fail now rather than after an hour; a Hub checkpoint is fetched as it is read
        checkpoint.locate()
    return checkpoint


class Checkpoint:
    """The layers of a checkpoint and their matrices, read from the files when asked for.

    Use [`open_checkpoint`] to make one.

    Attributes:
        stack: The layers, on the meta device (shapes without values).
        kinds: The kinds of matrix to read, in the order of `KINDS`.
        notes: What the model has but is left out, and why.
    """

    def __init__(
        self,
        stack: LayerStack,
        shards: Shards,
        kinds: tuple[str, ...],
        notes: tuple[str, ...] = (),
        block: tuple[int, int] | None = None,
    ) -> None:
        self.stack = stack
        self.kinds = kinds
        self.notes = notes
        self._shards = shards
        self._block = block
        self._sources = find_sources(stack.model, shards.keys)
        self._names = [
            name
            for layer in range(self.num_layers)
            for name, weight in self._weights(layer, stack.layers[layer])
            if set(kinds) & set(weight.kinds)
        ]
        if missing := [name for name in self._names if name not in self._sources]:
            raise LayerProbeError(
                f"The checkpoint {shards.name!r} has no tensor for {len(missing)} of the {len(self._names)} matrices of "
                f"{type(stack.model).__name__}, such as {missing[0]!r} (its {len(shards.keys)} tensors have names such as "
                f"{min(shards.keys, default=None)!r}). Its config names another class than it was saved from, or it is "
                "not whole."
            )

    @property
    def num_layers(self) -> int:
        return self.stack.num_layers

    def locate(self) -> None:
        """Finds (on the Hub: fetches) all files that hold matrices of the layers.

        Raises:
            LayerProbeError: A file that the index names is not there.
        """
        self._shards.locate(key for name in self._names for key, _ in self._sources[name].keys)

    def shapes(self, layer: int, kind: str) -> list[tuple[int, int]]:
        """`(out, in)` of the matrices of `parts`, without reading them.

        Raises:
            LayerProbeError: No such layer, a kind that no layer has, or one that cannot be told apart in this layer.
        """
        if kind not in self.kinds or not 0 <= layer < self.num_layers:
            raise LayerProbeError(
                f"{self.stack.path!r} has layers 0 to {self.num_layers - 1} with matrices {', '.join(self.kinds)}; got "
                f"layer {layer!r}, kind {kind!r}."
            )
        parts = matrix_parts(self.stack.layers[layer], self.stack.owner.config, kind)
        return [tuple(part.shape) for part in parts]

    def parts(self, layer: int, kind: str) -> list[torch.Tensor]:
        """The matrices of that kind in one layer, `[out, in]` each, read now: several for a mixture of experts.

        In the dtype they are stored in (8-bit floats: that of the config); none for a layer that lacks the kind.

        Raises:
            LayerProbeError: As [`shapes`], and: a file is damaged; a tensor has another shape than the config says, is
                quantised, or holds NaN or infinite values.
        """
        if not self.shapes(layer, kind):
            return []
        # The splitting works on modules, so the values go into a copy of the layer; all its other parameters stay empty.
        module = deepcopy(self.stack.layers[layer])
        for name, weight in list(self._weights(layer, module)):
            if kind in weight.kinds:
                values = self._read(name, getattr(weight.owner, weight.parameter).shape)
                weight.owner.register_parameter(weight.parameter, nn.Parameter(values, requires_grad=False))
        parts = matrix_parts(module, self.stack.owner.config, kind)
        for part in parts:
            check_readable(part, f"the {kind} matrix of layer {layer} ({self.stack.path})")
        return parts

    def fingerprint(self) -> str:
        """What tells this checkpoint from others: its commit on the Hub, or its files with their sizes and times."""
        return self._shards.version()

    def _weights(self, layer: int, module: nn.Module) -> Iterator[tuple[str, NamedWeight]]:
        """The named weights of a layer (or of a copy of it), each with its parameter's name in the model."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for weight in find_modules(module):
            name = names[id(getattr(weight.owner, weight.parameter))]
            yield f"{self.stack.path}.{layer}.{name}", weight

    def _read(self, name: str, shape: torch.Size) -> torch.Tensor:
        model, source = self.stack.model, self._sources[name]
        dtype = getattr(model.config, "dtype", None) or torch.float32

        def read(key: str) -> torch.Tensor:
            return read_float(self._shards, key, dtype=dtype, block=self._block)

        values = load_parameter(model, name, source, read)
        if values.shape != shape:
            keys = ", ".join(key for key, _ in source.keys[:2]) + (", …" if len(source.keys) > 2 else "")
            raise LayerProbeError(
                f"The parameter {name!r} is {tuple(values.shape)} in the files of {self._shards.name!r} ({keys}), and "
                f"{tuple(shape)} by the config. The config belongs to another checkpoint, or was edited."
            )
        return values

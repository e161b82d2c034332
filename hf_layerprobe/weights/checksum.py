"""Tells models of the same shape apart, whatever dtype they are loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from ..stacks import LayerStack
from ..stacks.adapters import base_modules
from .conversion import find_sources, load_parameter
from .shards import Shards

# Signs read from each matrix: enough to see that a model was trained further, few enough for any size.
SIGNS = 65_536
# Bytes that one parameter of the model may need in memory while it is made from several tensors of the files.
CONVERTED = 64 * 1024**2

Read = Callable[[str], torch.Tensor | None]


def sign_checksum(stack: LayerStack, read: Read | None = None) -> str | None:
    """SHA-256 of the signs of the first values of every matrix in a stack, adapters aside (our own definition).

    Signs survive a cast between floating-point types, down to those of values that round to zero.

    Args:
        stack: The layers.
        read: Gives a parameter's values by its name in the model, where they are not in memory; see [`file_values`].

    Returns:
        The checksum; None where weights cannot be had or are not plain floating point (offloaded, quantised).
    """
    digest, empty = hashlib.sha256(), True
    named = (
        (f"{path}.{name}", parameter)
        for path, module, _ in base_modules(stack.layers)
        for name, parameter in module.named_parameters(recurse=False)
    )
    for name, parameter in named:
        if parameter.dim() < 2:
            continue
        values = parameter.detach() if read is None else read(f"{stack.path}.{name}")
        if values is None or values.is_meta or not _is_plain(values):
            return None
        signs = torch.signbit(values.flatten()[:SIGNS]).cpu().numpy()
        digest.update(f"{name} {tuple(values.shape)}".encode() + signs.tobytes())
        empty = False
    return None if empty else digest.hexdigest()  # packed weights may be no parameters at all


def file_values(model: nn.Module, shards: Shards) -> Read:
    """Reads parameters of a model on the meta device from its files; None for those that are in none, or too large to convert."""
    sources, parameters = find_sources(model, shards.keys), model.state_dict()

    def read(name: str) -> torch.Tensor | None:
        source = sources.get(name)
        if source is None or (source.converter is not None and parameters[name].nbytes > CONVERTED):
            return None
        return load_parameter(model, name, source, shards.read)

    return read


def _is_plain(values: torch.Tensor) -> bool:
    return type(values) in (torch.Tensor, nn.Parameter) and values.is_floating_point() and values.element_size() > 1

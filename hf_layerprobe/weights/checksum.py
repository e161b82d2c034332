"""Tells models of the same shape apart, whatever dtype they are loaded in."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..stacks import LayerStack
from ..stacks.adapters import base_modules

# Signs read from each matrix: enough to see that a model was trained further, few enough for any size.
SIGNS = 65_536


def sign_checksum(stack: LayerStack) -> str | None:
    """SHA-256 of the signs of the first values of every matrix in a stack, adapters aside (our own definition).

    Signs survive a cast between floating-point types, down to those of values that round to zero.

    Returns:
        The checksum; None where weights are not in memory or not plain floating point (offloaded, quantised).
    """
    digest = hashlib.sha256()
    named = (
        (f"{path}.{name}", parameter)
        for path, module, _ in base_modules(stack.layers)
        for name, parameter in module.named_parameters(recurse=False)
    )
    for name, parameter in named:
        if parameter.dim() < 2:
            continue
        values = parameter.detach()
        plain = (
            type(values) in (torch.Tensor, nn.Parameter) and values.is_floating_point() and values.element_size() > 1
        )
        if values.is_meta or not plain:
            return None
        signs = torch.signbit(values.flatten()[:SIGNS]).cpu().numpy()
        digest.update(f"{name} {tuple(values.shape)}".encode() + signs.tobytes())
    return digest.hexdigest()

"""The whole tensor behind a parameter: gathered where it is sharded, with the adapter's share where there is one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import LayerProbeError
from .naming import NamedWeight
from .packed import is_packed, packed_shape, unpack, unpack_adapted


def merged(weight: NamedWeight) -> torch.Tensor:
    """The parameter that the model computes with: with its active adapters merged, if it has any.

    Merging into the module and out of it again would not give back the same weights, so it is done in a copy.

    Raises:
        LayerProbeError: An adapter that cannot be merged, or a parameter that is partitioned.
    """
    if weight.adapter is None:
        return base(weight)
    if is_packed(weight.owner):
        return unpack_adapted(weight.adapter, weight.owner)
    module = copy.deepcopy(weight.adapter)
    with torch.no_grad():
        while hasattr(module, "base_layer"):
            try:
                module.merge()
            except Exception as error:  # what a method of PEFT raises for what it cannot merge is its own affair
                raise LayerProbeError(
                    f"The {type(module).__name__} of {', '.join(weight.kinds)} cannot be merged on the fly "
                    f"({type(error).__name__}: {error}). Read the weights below it with adapters='base'."
                ) from error
            module = module.base_layer
    return gathered(getattr(module, weight.parameter))


def base(weight: NamedWeight) -> torch.Tensor:
    """The parameter itself, without adapters (unless they have been merged into it for good).

    Raises:
        LayerProbeError: A parameter that is partitioned.
    """
    owner = weight.owner
    return unpack(owner) if is_packed(owner) else gathered(getattr(owner, weight.parameter))


def outline(weight: NamedWeight) -> torch.Tensor:
    """A tensor of the whole parameter's shape without values; nothing is gathered or unpacked."""
    owner = weight.owner
    shape = packed_shape(owner) if is_packed(owner) else full_shape(getattr(owner, weight.parameter))
    return torch.empty(shape, device="meta")


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, detached and dequantised. One sharded by FSDP2 or tensor parallelism is gathered by all its processes,
    each of which has to ask for it.

    Raises:
        LayerProbeError: Partitioned in a way that only its own library can undo (DeepSpeed ZeRO-3).
    """
    if parameter.numel() == 0 and full_shape(parameter).numel():
        raise LayerProbeError(
            f"A weight of {list(full_shape(parameter))} has no values here: DeepSpeed ZeRO-3 has partitioned it. Scores of "
            "activations work; for those of weights use ZeRO-2 or FSDP2, or read the saved checkpoint."
        )
    parameter = parameter.detach()
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    # Quantised weights that pass for floating point, such as torchao's, are of a class that says how to read them.
    is_quantised = type(parameter).dequantize is not torch.Tensor.dequantize
    return parameter.dequantize() if is_quantised else parameter


def is_sharded(module: nn.Module) -> bool:
    """Whether reading this module's parameters takes all processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter in whole. Under ZeRO-3 a parameter is empty and has its shape in `ds_shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

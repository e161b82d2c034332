"""Modules in which a quantisation package packs a weight, read as the matrix that they multiply by, one at a time."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn

BITSANDBYTES = ("Params4bit", "Int8Params")
# Rows of the identity that go through a module at a time.
STRIPE = 1024


def is_packed(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight is not a matrix that torch can read."""
    return _by_bitsandbytes(module) or _compressed(module) or _quantised_linear(module)


def packed_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a packed weight, without reading it."""
    return module.out_features, module.in_features


def unpack(module: nn.Module) -> torch.Tensor:
    """The matrix `[out, in]` of a packed module; the module is left as it is."""
    with torch.no_grad():
        if _by_bitsandbytes(module):
            return _dequantised(module)
        module = copy.deepcopy(module)
        if _compressed(module):
            from compressed_tensors.compressors import decompress_module

            decompress_module(module)
            return module.weight.detach()
        return _multiplied_by(module, module.in_features, module.qweight.device)


def unpack_adapted(adapter: nn.Module, packed: nn.Module) -> torch.Tensor:
    """The matrix `[out, in]` by which a PEFT layer around a packed module multiplies; both are left as they are.

    PEFT would merge into the packed weight and round the sum to its few bits, which is not what the layer computes.
    """
    weight = unpack(packed).float()
    adapter = copy.deepcopy(adapter)
    inner = adapter
    while hasattr(inner.base_layer, "base_layer"):
        inner = inner.base_layer
    plain = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    plain.weight = nn.Parameter(weight)
    inner.base_layer = plain
    return _multiplied_by(adapter, plain.in_features, weight.device)


def _dequantised(module: nn.Module) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if type(module.weight).__name__ == "Params4bit":
        # The first run on a CPU may pack the weight anew for its kernel; taking the state dict of a module undoes that.
        module = copy.deepcopy(module)
        module.state_dict()
        return dequantize_bnb_weight(module.weight).detach()
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB  # they move at the first run
    return dequantize_bnb_weight(module.weight, SimpleNamespace(SCB=scales)).detach()


def _by_bitsandbytes(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(weight).__name__ in BITSANDBYTES and not weight.is_floating_point()


def _compressed(module: nn.Module) -> bool:
    """By compressed-tensors, which unpacks them when the model first runs."""
    return getattr(module, "quantization_status", None) == "compressed" and hasattr(module, "in_features")


def _quantised_linear(module: nn.Module) -> bool:
    """GPTQ's and AWQ's modules: what they hold depends on the kernel, and changes when they first run."""
    return getattr(module, "qweight", None) is not None and hasattr(module, "in_features")


@torch.no_grad()
def _multiplied_by(module: nn.Module, in_features: int, device: torch.device) -> torch.Tensor:
    """What a linear module does to each unit vector, up to the rounding of the dtype that it computes in."""
    module.eval()
    identity = torch.eye(in_features, device=device)
    bias = module(torch.zeros_like(identity[:1]))
    return torch.cat([module(stripe) - bias for stripe in identity.split(STRIPE)]).T.contiguous()

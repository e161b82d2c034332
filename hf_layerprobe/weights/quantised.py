"""Quantised checkpoints: 8-bit floats are multiplied by their stored scales, all others are refused by name."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from ..errors import LayerProbeError
from .shards import Shards

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Both are factors, whatever the name says: weight = stored value * scale.
SCALES = ("_scale_inv", "_scale")
# Quantisation methods that store 8-bit floats under the plain tensor names, and the formats of those that have several.
FLOAT8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
FLOAT8_FORMATS = (None, "float-quantized", "naive-quantized", "dense")
# Rows converted at a time, so that no second copy of a matrix is made in float32.
STRIPE = 1024


def find_quantisation(config: PreTrainedConfig) -> dict:
    """The quantization settings in a config, or in the config of its text model; empty without any.

    Raises:
        LayerProbeError: A method other than 8-bit floats with scales.
    """
    nodes = (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig)))
    found = next((node.quantization_config for node in nodes if getattr(node, "quantization_config", None)), {})
    method, form = found.get("quant_method"), found.get("format")
    if found and (method not in FLOAT8_METHODS or form not in FLOAT8_FORMATS):
        raise LayerProbeError(
            f"The checkpoint is quantised with {method!r}{f' ({form})' if form else ''}, which is not read from its files; "
            f"8-bit floats with scales are ({', '.join(FLOAT8_METHODS)}). Load the model and pass the model, or use the "
            "original checkpoint."
        )
    return found


def read_float(
    shards: Shards, key: str, *, dtype: torch.dtype = torch.float32, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """One tensor as it is stored, or multiplied by its scale if it is stored in 8-bit floats.

    Args:
        shards: The files.
        key: The tensor's name in them.
        dtype: What 8-bit floats become.
        block: Rows and columns that share a scale, where the config says.

    Raises:
        LayerProbeError: A tensor of another dtype, without its scale, or with a scale that does not fit it.
    """
    tensor = shards.read(key)
    if tensor.dtype in FLOATS:
        return tensor
    if tensor.dtype not in FLOAT8:
        raise LayerProbeError(
            f"The tensor {key!r} is quantised ({tensor.dtype}); load the model dequantised and pass the model."
        )
    names = [key + ending for ending in SCALES]
    scale_key = next((name for name in names if name in shards), None)
    if scale_key is None:
        raise LayerProbeError(
            f"The tensor {key!r} is stored in 8-bit floats ({tensor.dtype}) and its scale is not in the checkpoint: "
            f"expected {' or '.join(map(repr, names))}. Its values mean nothing without one."
        )
    scale = shards.read(scale_key)
    steps = None
    if tensor.dim() == 2 and scale.is_floating_point():
        grid = scale[:, None] if scale.dim() == 1 else scale
        grid = grid.reshape(1, 1) if grid.numel() == 1 else grid
        steps = _steps(tensor.shape, grid.shape, block)
    if steps is None:
        raise LayerProbeError(
            f"The scale {scale_key!r} ({tuple(scale.shape)}, {scale.dtype}) does not fit the tensor {key!r} "
            f"({tuple(tensor.shape)}, {tensor.dtype}): expected one factor, one for each row, or one for each block of "
            f"{block or 'equal size'} of a matrix. Load the model dequantised and pass the model."
        )
    return _scaled(tensor, grid.float(), steps, dtype)


def _steps(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of `shape` [out, in] that share an entry of `grid`; None if they do not fit."""
    steps = []
    for dim in range(2):
        size, count = shape[dim], grid[dim] if len(grid) == 2 else 0
        if block is not None and count == math.ceil(size / block[dim]):
            steps.append(block[dim])  # the last block may be cut short
        elif count and size % count == 0:
            steps.append(size // count)
        else:
            return None
    return steps[0], steps[1]


def _scaled(tensor: torch.Tensor, scale: torch.Tensor, steps: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """`tensor` [out, in] times `scale` [blocks of rows, blocks of columns]."""
    rows, columns = tensor.shape
    scale = scale[:, torch.arange(columns) // steps[1]] if scale.shape[1] > 1 else scale
    result = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, STRIPE):
        stripe = tensor[start : start + STRIPE].float()
        result[start : start + STRIPE] = stripe * scale[torch.arange(start, start + len(stripe)) // steps[0]]
    return result

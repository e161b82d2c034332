"""Whether a reloaded model is the original without some layers, by its own means: nothing of the library's gate is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

TOLERANCE = 1e-4
STATE = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "shared_kv_states")


@contextmanager
def without(lists: Sequence[nn.ModuleList], removed: Sequence[int]) -> Iterator[None]:
    """Within the context, the removed layers return what they were given.

    Args:
        lists: The layers, and the lists that lose the same entries.
        removed: Layers, 0-based.
    """
    # XLM keeps the attentions, MLPs and norms of its layers in lists of their own and adds them up outside.
    is_parts = any(isinstance(layers[0], nn.LayerNorm) for layers in lists)
    handles = [
        layers[i].register_forward_hook(
            _nothing if is_parts and not isinstance(layers[i], nn.LayerNorm) else _unchanged,
            with_kwargs=True,
            prepend=True,
        )
        for layers in lists
        for i in removed
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unchanged(module: nn.Module, args: tuple, kwargs: dict, output):
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.is_floating_point()]
    if isinstance(output, torch.Tensor):
        assert output.shape == given[0].shape, "not a layer that adds to a stream"
        return given[0]
    parts = list(output)
    assert isinstance(parts[0], torch.Tensor) and parts[0].shape == given[0].shape, "not a layer that adds to a stream"
    parts[0] = given[0]
    return type(output)(parts) if isinstance(output, list) else tuple(parts)


def _nothing(module: nn.Module, args: tuple, kwargs: dict, output):
    return 0 * output if isinstance(output, torch.Tensor) else (0 * output[0], *output[1:])


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating-point tensor of a model's output by its place in it, caches apart."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # masks that a model draws
        return dict(_tensors(model(**inputs), ""))


def _tensors(output, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield place, output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in STATE:
                yield from _tensors(value, f"{place}.{name}")
    elif isinstance(output, (list, tuple)):
        # Lists with one entry for each layer are shorter in a smaller model, so their entries say nothing.
        for i, value in enumerate(output):
            yield from _tensors(value, f"{place}[{i} of {len(output)}]")


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the output's largest value where that is above 1; infinite if nothing can be compared."""
    common = [name for name in expected if name in found]
    if not common or any(expected[name].shape != found[name].shape for name in common):
        return math.inf
    if any("[" not in name for name in expected.keys() ^ found.keys()):
        return math.inf
    differences = [_relative(expected[name], found[name]) for name in common if expected[name].numel()]
    return max(differences, default=math.inf)


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return math.inf
    expected, found = expected.double().nan_to_num(0, 0, 0), found.double().nan_to_num(0, 0, 0)
    return ((expected - found).abs().max() / expected.abs().max().clamp_min(1)).item()

"""Whether a reloaded model is the original without some layers, by its own means: nothing of the library's gate is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

TOLERANCE = 1e-4
NORMS = (nn.LayerNorm, nn.GroupNorm)
ADDED_OUTSIDE = {"AutoformerDecoderLayer": 1}  # the second output is added to a stream outside of the layer
STATE = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "shared_kv_states")


@contextmanager
def without(lists: Sequence[nn.ModuleList], removed: Sequence[int]) -> Iterator[None]:
    """Within the context, the removed layers return what they were given.

    Args:
        lists: The layers, and the lists that lose the same entries.
        removed: Layers, 0-based.
    """
    # XLM (and CLVP) keep the attentions, MLPs and norms of their layers in lists of their own and add them up outside.
    is_parts = any(isinstance(layers[0], NORMS) for layers in lists)
    # SuperGlue's layers return what is to be added, too.
    is_parts |= type(lists[0][0]).__name__ == "SuperGlueAttentionalPropagation"
    handles = [
        layers[i].register_forward_hook(
            _nothing if is_parts and not isinstance(layers[i], NORMS) else _unchanged,
            with_kwargs=True,
            prepend=True,
        )
        for layers in lists
        for i in removed
    ]
    states: list[torch.Tensor] = []
    for i in removed:  # what a missing layer would draw at random is there for the next one
        handles.append(lists[0][i].register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state())))
        handles.append(lists[0][i].register_forward_hook(lambda *_: torch.set_rng_state(states.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unchanged(module: nn.Module, args: tuple, kwargs: dict, output):
    named = sorted(kwargs, key=lambda name: name != "hidden_states")
    given = [*args, *(kwargs[name] for name in named)]
    given = [each for each in given if isinstance(each, torch.Tensor) and each.is_floating_point()]
    if isinstance(output, torch.Tensor):
        assert output.shape == given[0].shape, "not a layer that adds to a stream"
        return given[0]
    flat, build = tree_flatten(output)
    for k, part in enumerate(flat):
        # The first stream, and others beside it (the layout in LiLT, the image in LXMERT): never attention maps.
        if k == ADDED_OUTSIDE.get(type(module).__name__):
            flat[k] = torch.zeros_like(part)
        elif isinstance(part, torch.Tensor) and (k == 0 or part.dim() == 3):
            like = next((n for n, each in enumerate(given) if each.shape == part.shape and (k or n == 0)), None)
            assert k or like == 0, "not a layer that adds to a stream"
            if like is not None:
                flat[k] = given.pop(like)
    return tree_unflatten(flat, build)


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


def entries_of_kept(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], total: int, removed: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The original's outputs where those with an entry for each layer (the predictions of a DETR) lack the removed ones'."""
    kept = [i for i in range(total) if i not in removed]
    chosen = dict(expected)
    for name in expected.keys() & found.keys():
        before, after = expected[name].shape, found[name].shape
        other = [dim for dim, sizes in enumerate(zip(before, after, strict=False)) if sizes[0] != sizes[1]]
        if len(before) == len(after) and len(other) == 1 and (before[other[0]], after[other[0]]) == (total, len(kept)):
            chosen[name] = expected[name].index_select(other[0], torch.tensor(kept))
    return chosen


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

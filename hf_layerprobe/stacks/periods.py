"""Config fields of a rule that gives each layer its kind by its position, and that can hold another rule.

A kept set can be expressed where some rule of the same form says of every position what the layer is that comes to stand
there: the only attention layer of eight is the third of five when its offset becomes 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

# Layer i is special where i % period == offset % period: the field of the period → that of the offset, or a fixed offset.
PERIODS: dict[str, str | int] = {
    "attn_layer_period": "attn_layer_offset",
    "expert_layer_period": "expert_layer_offset",
    "cross_attention_frequency": 0,
    "encoder_sparse_step": -1,
    "decoder_sparse_step": -1,
}
# Switch Transformers has the same two fields, and counts from the second layer.
SWITCH = "num_sparse_encoder_layers"
# A step that is 0 where no layer is sparse, each for one side of an encoder-decoder.
STEPS = ("encoder_sparse_step", "decoder_sparse_step")
# Kinds that are repeated until there is one for each layer.
CYCLES = ("block_types",)
# A switch that gives every second layer its kind (PEGASUS-X).
ALTERNATING = ("stagger_local_blocks",)


def period_edits(node: PreTrainedConfig, field: str, num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    """New values of such fields, where there are some that fit; `field` is the one that holds the number of layers."""
    edits: dict[str, Any] = {}
    for name in CYCLES:
        if isinstance(kinds := getattr(node, name, None), list):
            edits[name] = [kinds[i % len(kinds)] for i in keep]
    for name in ALTERNATING:
        if getattr(node, name, False):
            edits[name] = any(i % 2 for i in keep)
    for name, at in PERIODS.items():
        period = vars(node).get(name)
        if type(period) is not int or (name in STEPS and ("decoder" in name) != ("decoder" in field)):
            continue
        if name in STEPS and hasattr(node, SWITCH):
            at = 1
        offset = getattr(node, at) if isinstance(at, str) else at
        special = [_is_special(i, period, offset) for i in keep]
        rule = _rule(special, period, offset, free=isinstance(at, str), may_be_none=name in STEPS)
        if rule is not None:
            edits[name] = rule[0]
            if isinstance(at, str):
                edits[at] = rule[1]
    return edits


def _is_special(position: int, period: int, offset: int) -> bool:
    return period > 0 and position % period == offset % period


def _rule(
    special: Sequence[bool], period: int, offset: int, *, free: bool, may_be_none: bool
) -> tuple[int, int] | None:
    """A period and an offset for the special positions, the old ones if they still are; None where there are none."""
    for each in (period, *range(1, len(special) + 2), *([0] if may_be_none else [])):
        for at in [offset, *range(each)] if free else [offset]:
            # An offset of its own has to be below the period (Jamba's config insists).
            if (not free or at < each) and [_is_special(j, each, at) for j in range(len(special))] == special:
                return each, at
    return None

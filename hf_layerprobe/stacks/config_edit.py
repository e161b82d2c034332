"""What a kept set changes in the config besides the number of layers.

Indices by which other parts read single layers are in `taps`. Every table is by name: a list as long as the stack that is in none of them is refused, because lists of that length
that mean something else exist (`encode_proj_layers`, `summary_idxs`) and guessing would save another model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..errors import PruningError
from .taps import TAPS, tap_edits

if TYPE_CHECKING:
    from .bind import ConfigBinding

# One entry for each layer: keep the entries of the kept layers.
PER_LAYER_LISTS = frozenset(
    [
        "layer_types",
        "mlp_layer_types",
        "indexer_types",
        "layer_rope_theta",
        "no_rope_layers",
        "layers_block_type",
        "activation_sparsity_pattern",
        "attention_layers",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
        "sliding_windows",
        "attn_layers",
        "gnn_layers_types",
        "attention_window",
    ]
)
# Lists that are per-layer in some models and something else in others: per-layer only when as long as the stack.
PER_LAYER_IF_LONG = frozenset(["intermediate_size"])
# Indices of layers: keep those of kept layers, renumbered.
LAYER_INDEX_LISTS = frozenset(
    [
        "mlp_only_layers",
        "full_attn_idxs",
        "moe_layers",
        "rope_scaling_layers",
        "global_attn_indexes",
        "fullatt_block_indexes",
        "window_block_indices",
        "window_block_indexes",
        "cross_attention_layers",
        "hybrid_layer_ids",
        "attn_layer_indices",
        "local_layer_ids",
    ]
)
# "The first k layers are different": k becomes the number of kept layers below it.
PREFIX_THRESHOLDS = frozenset(
    ["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers", "num_hash_layers"]
)
# "The last k layers are different".
SUFFIX_THRESHOLDS = frozenset(["num_kv_shared_layers"])
# As long as the stack by coincidence, or described again by a field above.
UNRELATED_LISTS = frozenset(
    [
        "architectures",
        "encode_proj_layers",
        "summary_idxs",
        "encoder_projection_indices",
        "attention_types",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "begin_suppress_tokens",
        "suppress_tokens",
        "forced_decoder_ids",
        "keys_to_ignore_at_inference",
        "id2label",
        "label2id",
        "mrope_section",
    ]
)


def edited_config(
    config: PreTrainedConfig, binding: ConfigBinding, num_layers: int, keep: Sequence[int]
) -> PreTrainedConfig:
    """The config of the same model with only the layers `keep` (0-based, ascending), read back from its own file.

    Raises:
        PruningError: A list of the config is as long as the stack and its meaning is not known.
    """
    node = config
    for name in binding.node:
        node = getattr(node, name)
    edits = tap_edits(config, binding, num_layers, keep)
    edits.setdefault(binding.node, {}).update(
        {binding.field: len(keep)} | _per_layer_edits(node, num_layers, keep),
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        path = Path(folder, "config.json")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for names, values in edits.items():
            target = saved
            for name in names:
                target = target.setdefault(name, {})
            target.update(values)
        path.write_text(json.dumps(saved), encoding="utf-8")
        edited = type(config).from_pretrained(folder)
    edited.name_or_path = config.name_or_path
    edited._attn_implementation = config._attn_implementation
    return edited


def _per_layer_edits(node: PreTrainedConfig, num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    new_index = {old: new for new, old in enumerate(keep)}
    edits: dict[str, Any] = {}
    for name, value in vars(node).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)):
            if name in LAYER_INDEX_LISTS:
                edits[name] = [new_index[i] for i in value if i in new_index]
            elif len(value) != num_layers or name in UNRELATED_LISTS or name in TAPS:
                continue
            elif name in PER_LAYER_LISTS or name in PER_LAYER_IF_LONG:
                edits[name] = [value[i] for i in keep]
            elif value and not isinstance(value[0], (dict, list, tuple)):
                raise PruningError(
                    f"The config list {name!r} of {type(node).__name__} has {num_layers} entries, as many as the stack "
                    "has layers, and it is not known whether they belong to the layers. Removing layers could save a "
                    f"model that computes something else. Found: {list(value)}."
                )
        elif type(value) is int and name in PREFIX_THRESHOLDS:
            edits[name] = sum(i < value for i in keep)
        elif type(value) is int and name in SUFFIX_THRESHOLDS:
            edits[name] = sum(i >= num_layers - value for i in keep)
    return edits

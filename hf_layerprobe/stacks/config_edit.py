"""What a kept set changes in the config besides the number of layers.

Indices by which other parts read single layers are in `taps`. Every table is by name: a list as long as the stack that is
in none of them is refused, because lists of that length that mean something else exist (`encode_proj_layers`,
`summary_idxs`) and guessing would save another model.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..errors import PruningError
from .periods import period_edits
from .refusal import Refusal
from .taps import TAPS, nodes, tap_edits

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
        "swiglu_limits",
        "swiglu_limits_shared",
    ]
)
# Of the encoder alone, where encoder and decoder share a config node.
ENCODER_LISTS = frozenset(["attention_window"])
# One entry for each layer: the layer whose keys and values it reads.
PRODUCER_LISTS = frozenset(["kv_source_layers"])
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
# EoMT's `num_blocks` is such a threshold too: its last layers read queries beside the image. Elsewhere it is a count.
QUERY_BLOCKS = "num_upscale_blocks"
# The index of the last layer that is different.
LAST_INDICES = frozenset(["moe_layer_end_index"])
# "Every k-th layer is sparse, but for those in `mlp_only_layers`".
SPARSE_STEP = "decoder_sparse_step"
# Divided by the root of the number of layers in the model's code.
ROOT_SCALES = frozenset(["scale_depth"])
# Plain dictionaries that a config derives from a count, and that win over it when read back (FastSpeech2Conformer).
DERIVED = {"encoder_layers": "encoder_config", "decoder_layers": "decoder_config"}
# Settings of single layers by index, in a dictionary.
PER_LAYER_CONFIG = "per_layer_config"
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
        *(
            "conv_dim",
            "conv_kernel",
            "conv_stride",
            "tdnn_dim",
            "tdnn_kernel",
            "tdnn_dilation",
        ),  # of sound, before or after
    ]
)


def edited_config(
    config: PreTrainedConfig, binding: ConfigBinding, num_layers: int, keep: Sequence[int]
) -> PreTrainedConfig:
    """The config of the same model with only the layers `keep` (0-based, ascending), read back from its own file.

    Raises:
        PruningError: A list of the config is as long as the stack and its meaning is not known, or the config does not
            hold what was written into it.
    """
    node = binding.config_node(config)
    edits = tap_edits(config, binding, num_layers, keep)
    own = edits.setdefault(binding.node, {})
    if binding.index is None:  # the lists of a pyramid have an entry for each stage
        own.update(_per_layer_edits(node, binding.field, num_layers, keep))
    own[binding.field] = binding.value(config, keep)
    own.update(_decoder_length(node, binding.field, own))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        path = Path(folder, "config.json")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for names, values in edits.items():
            target = saved
            for name in names:
                target = target.setdefault(name, {})
            target.update(values)
            for name in DERIVED.keys() & values:
                if isinstance(target.get(DERIVED[name]), dict) and not target[DERIVED[name]].get("model_type"):
                    del target[DERIVED[name]]
        path.write_text(json.dumps(saved), encoding="utf-8")
        edited = type(config).from_pretrained(folder)
    edited.name_or_path = config.name_or_path
    for names, inner in nodes(config):  # outer ones first: theirs is handed down, also to parts that do not support it
        _at(edited, names)._attn_implementation = inner._attn_implementation
        _at(edited, names)._experts_implementation = inner._experts_implementation
    _check_lists(binding.config_node(edited), node, own, num_layers)
    return edited


def _decoder_length(node: PreTrainedConfig, field: str, written: dict[str, Any]) -> dict[str, int]:
    """For T5 and its family, the name under which Transformers looks for the decoder's number of layers, to make its cache.

    Without it, it takes the encoder's, and a decoder of more layers than that fails to generate.
    """
    if not (
        node.is_encoder_decoder and hasattr(node, "num_decoder_layers") and "num_hidden_layers" in node.attribute_map
    ):
        return {}
    decoder = written.get("num_decoder_layers", node.num_decoder_layers)
    encoder = node.num_hidden_layers if field == "num_decoder_layers" else written[field]
    return {"decoder_layers": decoder} if encoder < decoder or hasattr(node, "decoder_layers") else {}


def _at(config: PreTrainedConfig, names: Sequence[str]) -> PreTrainedConfig:
    for name in names:
        config = getattr(config, name)
    return config


def _check_lists(edited: PreTrainedConfig, node: PreTrainedConfig, written: dict[str, Any], num_layers: int) -> None:
    """The config holds the per-layer lists that were written: some configs force the kind of a layer."""
    for name, value in written.items():
        found = vars(edited).get(name)
        if name in PER_LAYER_LISTS and isinstance(found, (list, tuple)) and list(found) != list(value):
            at = next(i for i, (a, b) in enumerate(zip(found, value, strict=True)) if a != b)
            place = "the last layer" if at == len(value) - 1 else f"layer {at}"
            raise Refusal(
                f"{type(edited).__name__} forces {name} of {place} to be {found[at]!r}, and the layer that would stand there "
                f"is {value[at]!r}",
                kinds=list(getattr(node, name))[:num_layers],
                wanted=list(found),
            )


def _per_layer_edits(node: PreTrainedConfig, field: str, num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    new_index = {old: new for new, old in enumerate(keep)}
    edits = period_edits(node, field, num_layers, keep)
    for name, value in vars(node).items():
        if name.startswith("_") or (name in ENCODER_LISTS and "decoder" in field):
            continue
        if isinstance(value, (list, tuple)):
            if name in LAYER_INDEX_LISTS:
                edits[name] = [new_index[i] for i in value if i in new_index]
            elif len(value) != num_layers or name in UNRELATED_LISTS or name in TAPS:
                continue
            elif name in PER_LAYER_LISTS or name in PER_LAYER_IF_LONG:
                edits[name] = [value[i] for i in keep]
            elif name in PRODUCER_LISTS:
                edits[name] = _producers(name, value, new_index)
            elif value and not isinstance(value[0], (dict, list, tuple)):
                raise _unknown(node, name, list(value), num_layers)
        elif isinstance(value, dict) and name != PER_LAYER_CONFIG and _is_by_layer(value, num_layers):
            if name not in UNRELATED_LISTS:
                raise _unknown(node, name, value, num_layers)
        elif type(value) is int and name in PREFIX_THRESHOLDS:
            edits[name] = sum(i < value for i in keep)
        elif type(value) is int and (
            name in SUFFIX_THRESHOLDS or (name == "num_blocks" and hasattr(node, QUERY_BLOCKS))
        ):
            edits[name] = sum(i >= num_layers - value for i in keep)
        elif type(value) is int and name in LAST_INDICES and value >= 0:
            edits[name] = sum(i <= value for i in keep) - 1
        elif isinstance(value, (int, float)) and name in ROOT_SCALES:
            edits[name] = value * math.sqrt(len(keep) / num_layers)
    step = getattr(node, SPARSE_STEP, 1)
    if hasattr(node, "mlp_only_layers") and step > 1:
        dense = [i for i in keep if i in (node.mlp_only_layers or ()) or (i + 1) % step]
        edits |= {SPARSE_STEP: 1, "mlp_only_layers": [new_index[i] for i in dense]}
    if getattr(node, "is_heterogeneous", False):
        settings = node._heterogeneity_spec.per_layer_overrides
        edits[PER_LAYER_CONFIG] = {str(new): settings[old] for new, old in enumerate(keep) if old in settings}
    return edits


def _producers(name: str, sources: Sequence[int], new_index: dict[int, int]) -> list[int]:
    lost = {i: sources[i] for i in new_index if sources[i] not in new_index}
    if lost:
        raise Refusal(
            f"layers {sorted(lost)} read the keys and values of layers {sorted(set(lost.values()))} ({name}), which must stay",
            needs=[{source} for source in lost.values()],
        )
    return [new_index[sources[i]] for i in new_index]


def _is_by_layer(value: dict, num_layers: int) -> bool:
    """Whether a dictionary has an entry for each layer, under its index."""
    return len(value) == num_layers and {str(key) for key in value} == {str(i) for i in range(num_layers)}


def _unknown(node: PreTrainedConfig, name: str, value: Any, num_layers: int) -> PruningError:
    return PruningError(
        f"The config list {name!r} of {type(node).__name__} has {num_layers} entries, as many as the stack "
        "has layers, and it is not known whether they belong to the layers. Removing layers could save a "
        f"model that computes something else. Found: {value}."
    )

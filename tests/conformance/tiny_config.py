"""A tiny config of any model type, from its default config by the names of its fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 6
VOCABULARY = 200


@dataclass(frozen=True)
class Size:
    """One way of making a config tiny; they are tried in turn, for no way fits every architecture.

    Attributes:
        hidden: Width of every residual stream.
        heads: Attention heads.
        equal_heads: As many key and value heads as query heads.
        lists: What becomes of a list with one entry for each layer: left out for the config to derive it anew, its first
            entries, or its distinct entries in turn.
        fill: Give fields that are `None` by default, and without which the model cannot be built, a value.
        shrink_width: Make everything tiny, or only the number of layers, the vocabulary and the positions.
    """

    hidden: int = 64
    heads: int = 4
    equal_heads: bool = False
    lists: str = "derive"
    fill: bool = False
    shrink_width: bool = True


SIZES = (
    Size(),
    Size(lists="first"),
    Size(lists="alternate"),
    Size(fill=True),
    Size(equal_heads=True),
    Size(hidden=128, equal_heads=True),
    Size(hidden=256, heads=2, equal_heads=True),  # heads of 128: sections of a rotary embedding written into the code
    Size(hidden=256, lists="first"),
    Size(shrink_width=False),
    Size(shrink_width=False, lists="first"),
)

# A number of layers, unless its name says that it is something else's.
COUNT = re.compile(
    r"(num_.*layers?|n_layers?|layers|.*_layers|depth|.*_depth|(num|n|num_hidden|.*_num)_blocks|num_self_attends_per_block)$"
)
OTHER_COUNT = re.compile(
    r"window_layers|kv_shared|feat_extract|residual_layers|nextn|mtp|adapter|postnet|prenet|lstm|upsampl|iou_head|look_"
    r"|subsample|max_depth|min_depth|skip|dropout|depth_multiplier|dense_layers|inter_layers|num_feature|output_layers"
    r"|conv_layers|proj|duration|predictor|variance|mlp_layers|head_layers|flow_num|wavenet|codebook|patch_depth|fpn"
    r"|pw_layers|channels|dense_replace"
)
STAGES = ("depths", "embed_dim_per_stage", "stage_out_channels")  # nodes that have them are pyramids: left as they are
TOKEN = re.compile(r"token_(id|index|idx)$")
TOKENS = dict(
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, sep_token_id=2, cls_token_id=1,
    unk_token_id=3, mask_token_id=4,
)  # fmt: skip
VOCABULARIES = re.compile(r"vocab_size|vocab_size_per_layer_input|encoder_hash_byte_group_vocab")
POSITIONS = re.compile(r"max_position|n_positions|n_ctx|max_seq_len|max_sequence_length|max_len$|seq_length$")

Rule = Callable[[int, Size, dict[str, Any]], int]


def _at_most(limit: int) -> Rule:
    return lambda value, size, node: min(value, limit)


def _wide(value: int, size: Size, node: dict[str, Any]) -> int:
    width = node.get("hidden_size") if "pixel_shuffle_ratio" not in node else None
    if width and value > width and value % width == 0:  # several layers' outputs side by side
        return value // width * size.hidden
    return size.hidden if value >= 40 else value


def _inner(value: int, size: Size, node: dict[str, Any]) -> int:
    if "pixel_shuffle_ratio" in node:  # neighbours side by side
        return int(size.hidden / node["pixel_shuffle_ratio"] ** 2)
    return 2 * size.hidden if value >= 64 else value


def _is_mamba(node: dict[str, Any]) -> bool:
    return "state_size" in node and "expand" in node


def _mamba_width(node: dict[str, Any], size: Size) -> int:
    return int((node.get("mamba_expand") or node.get("expand") or 2) * size.hidden)


def _kv_heads(value: int, size: Size, node: dict[str, Any]) -> int:
    if value <= 1:
        return value
    heads = node.get("num_attention_heads")
    return 2 if not size.equal_heads and isinstance(heads, int) and value < heads else size.heads


def _head_dim(value: int, size: Size, node: dict[str, Any]) -> int:
    if _is_mamba(node):
        return _mamba_width(node, size) // 8
    rope, nope = node.get("qk_rope_head_dim"), node.get("qk_nope_head_dim")
    if rope and value == rope:
        return 8
    if rope and value == rope + (nope or 0):
        return 16
    return min(value, size.hidden // size.heads)


def _image_size(value: int, size: Size, node: dict[str, Any]) -> int:
    patch = node.get("patch_size")
    if patch is None and "window_size" not in node:  # convolutions alone
        return min(value, 64)
    plain = isinstance(patch, int) and not any(name in node for name in ("window_size", "stage_depths"))
    return min(value, 4 * patch) if plain or "global_attn_indexes" in node else value


def _window(value: int, size: Size, node: dict[str, Any]) -> int:
    spatial = ("depths", "fullatt_block_indexes", "spatial_merge_size", "embed_dim_per_stage", "downsample_rate")
    return value if any(name in node for name in spatial) else min(value, 4)


# What a node's integers become; the first name that matches counts.
NARROW: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"output_channels$", lambda value, size, node: size.hidden if "global_attn_indexes" in node else value),
        (r"num_pos_feats$", lambda value, size, node: size.hidden // 2 if "global_attn_indexes" in node else value),
        (r"image_embedding_size$",
         lambda value, size, node: _image_size(node["image_size"], size, node) // node["patch_size"]),
        (r"vit_dim$", lambda value, size, node: size.hidden),
        (r"chunk_size_feed_forward$|type_vocab_size$|patch_embed_hidden_size$", lambda value, size, node: value),
        (r"backbone_hidden_size$", lambda value, size, node: size.hidden),
        (r"insert_layer_id$", _at_most(2)),
        (r"upsample_groups$", lambda value, size, node: min(value, size.hidden)),
        (r"mamba_(n|num)_heads$", lambda value, size, node: 8),
        (r"num_heads$", lambda value, size, node: 8 if _is_mamba(node) else min(value, size.heads)),
        (r"mamba_(d_head|head_dim)$", lambda value, size, node: _mamba_width(node, size) // 8),
        (r"mamba_headdim$", lambda value, size, node: _mamba_width(node, size) // size.heads),
        (r"mamba_d_ssm$", lambda value, size, node: _mamba_width(node, size)),
        (r"time_step_rank$", lambda value, size, node: 4),
        (r"max_window_layers$", lambda value, size, node: 3),
        (r"num_kv_shared_layers|first_k_dense_replace$", _at_most(2)),
        (r"experts_per_tok|moe_topk|top_k_experts|moe_k$|moe_top_k|router_top_k", _at_most(2)),
        (r"shared_experts", _at_most(1)),
        (r"experts$", _at_most(4)),
        (r"n_group$|num_expert_group$|topk_group$", _at_most(1)),
        (r"num_key_value_heads|n?u?m?_?kv_heads|num_key_value_groups|num_global_key_value_heads", _kv_heads),
        (r"attention_heads|n_heads?$|num_heads$|num_query_heads|num_q_heads|heads$|num_attn_heads",
         lambda value, size, node: min(value, size.heads) if value > 1 else value),
        (r"qk_(nope|rope)_head_dim$", _at_most(8)),
        (r"(qk|v)_head_dim$|(kv|q|o)_lora_rank$", _at_most(16)),
        (r"head_dim$|attention_head_size|d_kv$|dim_head$|head_size$|kv_channels$|rotary_dim$|d_head$", _head_dim),
        (r"hidden_size_per_layer_input$", _at_most(8)),
        (r"projection_dim$", lambda value, size, node: size.hidden if value >= 40 else value),
        (r"(d_latents|(.*_)?hidden_size|(.*_)?d_model|n_embd|(.*_)?embed_dim|emb_dim|dim|model_dim|hidden_dim"
         r"|(.*_)?embedding_size|word_embed_proj_dim|d_embed|width|hidden_channels|(.*_)?embedding_dim|lru_width"
         r"|hidden_width|(.*_)?output_dim|projector_input_dim|qformer.*hidden.*)$", _wide),
        (r"intermediate_size$", _inner),
        (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|n_inner|d_inner|ffn_hidden_size|feedforward_dim|ffn_size|linear_units"
         r"|shared_intermediate)", lambda value, size, node: 2 * size.hidden if value >= 64 else value),
        (r".*(sliding_window$|sliding_window_size|attention_window|local_attention|attention_chunk_size)|window_size$",
         _window),
        (r".*max_source_positions", _at_most(64)),
        (r"image_size$", _image_size),
        (r"crop_size$", lambda value, size, node: _image_size(value, size, node) if value == node.get("image_size") else value),
        (r"ext_pw_out_channel$|depthwise_separable_out_channel$", lambda value, size, node: size.hidden),
        (r"mm_tokens_per_image$|vision_soft_tokens_per_image$", _at_most(4)),
        (r"query_pre_attn_scalar$", lambda value, size, node: size.hidden // size.heads),
        (r".*(codebook_size|num_embeddings|codebook_dim|vector_quantization_hidden_dimension)", _at_most(64)),
    )
)  # fmt: skip
LAYERS_ONLY = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r".*(max_source_positions)", _at_most(128)),
        (r".*(n|num|local|routed)_experts$", _at_most(4)),
        (r".*(experts_per_tok|moe_topk|top_k_experts|moe_k$)", _at_most(2)),
    )
)
# Values of fields that are None by default where the model cannot be built without.
FILLINGS = dict(
    prediction_length=16, pad_token_id=0, mask_token_id=4, sliding_window=4, top_k_experts=2, num_local_experts=4, num_routed_experts=4, vocab_size=100,
    vocabulary_map={"<image>": 5, "IMGIMGAZ": 6, "<|visual token 000000|>": 7}, attn_layer_indices=[1, 4],
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2,
    num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, linear_num_key_heads=4,
    linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16, num_experts_per_tok=2,
    topk_group=1, n_group=1, n_routed_experts=4, n_shared_experts=1, num_experts=4, routed_scaling_factor=1.0,
    image_token_index=5, image_token_id=5, audio_token_id=6, moe_intermediate_size=64, first_k_dense_replace=1, layer_types=["full_attention"] * LAYERS,
)  # fmt: skip
RESNET = dict(
    model_type="resnet", embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic"
)
# Tokens that no config has by default: ShieldGemma 2's code then takes those of its own vocabulary, and MiniCPM-V has no images.
TOKENS_OF = {
    "shieldgemma2": {"yes_token_index": 8, "no_token_index": 9},
    **{name: {"image_token_id": 5, "video_token_id": 6} for name in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")},
}
DERIVED = (
    "transformers_version", "_name_or_path", "id2label", "label2id", "per_layer_config", "stage_names", "hybrid_layer_ids",
)  # fmt: skip


def tiny_configs(config_class: type[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """Tiny configs of a class, those first that fit most architectures; none where its defaults are not a config."""
    try:
        defaults = config_class().to_dict()
    except Exception:  # configs that need other configs
        return
    seen = set()
    for size in SIZES:
        try:
            fields = _tiny(defaults, size, {})
            # Those of nodes inside say which class they are.
            fields |= TOKENS_OF.get(fields.pop("model_type", None), {})
            config = config_class(**fields)
            content = config.to_json_string(use_diff=False)
        except Exception:  # whatever its validation raises
            continue
        if content not in seen:
            seen.add(content)
            yield config


def _tiny(node: dict[str, Any], size: Size, tokens: dict[str, int]) -> dict[str, Any]:
    """The fields of one config node; nodes inside it included."""
    counts = {value for name, value in node.items() if _is_count(name, value) and value > 1}
    tiny: dict[str, Any] = {}
    for name, value in node.items():
        if name in DERIVED:
            continue
        if name in ("out_indices", "out_features"):
            tiny |= _outputs(name, node, max(counts, default=0))
        elif value is None and size.fill and name in FILLINGS:
            tiny[name] = FILLINGS[name]
        elif type(value) is int:
            tiny[name] = _tiny_int(name, value, size, node, tokens)
        elif isinstance(value, dict):
            tiny[name] = _tiny_dict(name, value, size, node, tokens)
        elif name == "width_coefficient" and size.shrink_width:  # of widths that EfficientNet names, up to 320
            tiny[name] = size.hidden / 320
        elif isinstance(value, (list, tuple)) and value:
            if (entries := _tiny_list(name, list(value), counts, size, node)) is not None:
                tiny[name] = entries
        else:
            tiny[name] = value
    return tiny


def _is_count(name: str, value: Any) -> bool:
    return type(value) is int and bool(COUNT.match(str(name))) and not OTHER_COUNT.search(name)


def _tiny_int(name: str, value: int, size: Size, node: dict[str, Any], tokens: dict[str, int]) -> int:
    if name == "num_hidden_layers" and "link_tower_type" in node:
        return LAYERS // 2  # layers that fuse text and image: half as many as either tower has
    if TOKEN.search(name):
        # One id for `image_token_id` and `image_token_index`; none twice.
        key = TOKEN.sub("token_id", name)
        return value if value < 0 else TOKENS.get(key) or tokens.setdefault(key, 5 + len(tokens)) * (key not in TOKENS)
    if _is_count(name, value) and 2 <= value <= 400:
        return LAYERS
    text = "vocab_size" in name or re.match(r"(d_model|hidden_dim|projection_dim|(de|en)coder_.*)$", name)
    if any(stage in node for stage in STAGES) and not text:
        return value
    if VOCABULARIES.search(name) and name != "type_vocab_size":
        return min(value, VOCABULARY) if value > 8 else value
    if POSITIONS.search(name):
        return min(value, 128)
    for pattern, rule in NARROW if size.shrink_width else LAYERS_ONLY:
        if pattern.match(name) or (pattern.pattern[0] not in "(." and pattern.search(name)):
            return rule(value, size, node)
    return value


def _tiny_dict(name: str, value: dict, size: Size, node: dict[str, Any], tokens: dict[str, int]) -> dict:
    if value.get("model_type") == "timm_backbone":  # of another library
        return {**RESNET, "out_indices": value["out_indices"]}
    if "model_type" in value or any(key == "hidden_size" or _is_count(key, entry) for key, entry in value.items()):
        return _tiny(value, size, tokens)
    if name == "projector_patch_to_query_dict":  # number of patches → number of queries
        return {16: 4}
    if "rope" in name:
        return {
            key: _tiny_dict(name, entry, size, node, tokens) if isinstance(entry, dict)
            else _sections(size, value) if key == "mrope_section" and entry else entry
            for key, entry in value.items()
        }  # fmt: skip
    return value


def _sections(size: Size, rope: dict[str, Any]) -> list[int]:
    rotated = max(int(size.hidden // size.heads * (rope.get("partial_rotary_factor") or 1)) // 2, 3)
    return [rotated - 2 * (rotated // 3), rotated // 3, rotated // 3]


def _tiny_list(name: str, entries: list, counts: set[int], size: Size, node: dict[str, Any]) -> list | None:
    """The list, or None for the config to derive it."""
    if name in ("depths", "num_heads") and len(set(node.get("depths") or ())) == 1 and len(node["depths"]) > 4:
        return entries[:2]  # stages that are all alike (Swin2SR): each is a stack to try
    if len(entries) in counts and len(entries) >= 3 and name != "depths":
        if size.lists == "alternate" and isinstance(entries[0], str):
            kinds = list(dict.fromkeys(entries))
            if kinds == ["linear_attention"]:  # a hybrid whose default has no attention, and no cache without
                kinds.append("full_attention")
            return [kinds[i % len(kinds)] for i in range(LAYERS)]
        if size.lists == "derive":
            return None
        if entries == list(range(len(entries))):
            return list(range(LAYERS))
        first = entries[:LAYERS]
        if isinstance(entries[0], str):
            missing = [kind for kind in dict.fromkeys(entries) if kind not in first]
            first[3 - len(missing[:3]) + 1 : 4] = missing[:3]
        elif type(entries[0]) is int and max(entries) > 64:
            first = [_tiny_int(name.replace("_per_layer", ""), entry, size, node, {}) for entry in first]
        return first
    if name in ("conv_dim", "tdnn_dim") and size.shrink_width:
        return [32] * len(entries)
    if name == "image_grid_pinpoints":
        return [[112, 56], [56, 112], [112, 112]]
    most = max(counts, default=0)
    is_index = re.search(r"index|indices|idx|_layers$|layer_ids|attn_layers|blocks$", name)
    if re.search(r"feature_layers?$", name) and all(type(entry) is int for entry in entries):
        return list(dict.fromkeys(max(min(entry, LAYERS - 1), -LAYERS) for entry in entries))
    if is_index and all(type(entry) is int for entry in entries) and LAYERS <= max(entries) <= most:
        scale = LAYERS / (most if max(entries) < most else most + 1)
        return list(dict.fromkeys(min(int(entry * scale), LAYERS - 1) for entry in entries))
    if is_index and _ascends(entries) and entries[-1] >= LAYERS:  # of layers that another node counts
        return list(dict.fromkeys(entry * (LAYERS - 1) // entries[-1] for entry in entries))
    return entries


def _ascends(entries: list) -> bool:
    return len(entries) > 1 and all(type(a) is type(b) is int and a < b for a, b in pairwise(entries))


def _outputs(name: str, node: dict[str, Any], count: int) -> dict[str, Any]:
    """The layers that a backbone hands on, at the same relative depths."""
    value, stages = node[name], node.get("stage_names")
    if value is None or (name == "out_features" and node.get("out_indices")):
        return {}
    if not stages or len(stages) != count + 1 or count == LAYERS or "depths" in node:
        return {name: value}
    if name == "out_features":
        return {}
    moved: list[int] = []
    for index in reversed(value):
        index = round((index + count + 1 if index < 0 else index) * LAYERS / count)
        moved.insert(0, max(min(index, moved[0] - 1 if moved else LAYERS), 0))
    return {name: list(dict.fromkeys(moved))}

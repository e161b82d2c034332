"""Rules of the code around the layers, by class of the layer: no config field and no attribute of a layer shows them.

Each was found by a pruned model that computed something else than the original with the layers bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..errors import PruningError
from .refusal import Refusal


def check_rules(model: PreTrainedModel, path: str, keep: Sequence[int]) -> None:
    """Refuses a kept set with which the code around the layers would do something else.

    Raises:
        Refusal: With the reason, and what has to stay.
    """
    layers = model.get_submodule(path)
    if path.endswith("class_embed") and keep[-1] != len(layers) - 1:
        raise Refusal(
            f"{path!r} has a head for each layer, and the last makes the model's predictions, so the last layer must stay",
            needs=[{len(layers) - 1}],
        )
    if (rule := RULES.get(type(layers[0]).__name__)) is not None:
        rule(model, path, len(layers), keep)


def check_cache(old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """The cache of a hybrid, which is made from the config, counts tokens by its attention layers: one has to stay.

    Raises:
        Refusal: With the reason, and what has to stay.
    """
    before = _attention_layers(old)
    if before and _attention_layers(new) == []:
        raise Refusal(
            "at least one layer with attention must stay: the model's cache counts tokens by it, and its forward pass fails "
            "without",
            needs=[before],
        )


def check_lengths(old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """For ProphetNet, Transformers makes the decoder's cache for as many layers as the encoder has: the encoder may not
    become the shorter one.

    Raises:
        PruningError: It would.
    """
    before, after = _attention_layers(old), _attention_layers(new)
    if before and after and getattr(new, "is_encoder_decoder", False):
        decoders = [getattr(config, "num_decoder_layers", 0) or 0 for config in (old, new)]
        if len(before) >= decoders[0] and len(after) < decoders[1]:
            raise PruningError(
                f"The encoder would be left with {len(after)} layers and the decoder with {decoders[1]}, and Transformers makes "
                f"the cache of this {new.model_type} decoder for as many layers as the encoder has: it could no longer generate. "
                f"Remove at least {decoders[1] - len(after)} layers of the decoder in the same call, by a dict: "
                "remove={path of the encoder: [...], path of the decoder: [...]}."
            )


def check_towers(kept: Mapping[str, Sequence[int]], model: PreTrainedModel) -> None:
    """BridgeTower's code counts the layers of both towers by those of one: they need equally many.

    Args:
        kept: The layers that stay, by path of the stack.
        model: The model.

    Raises:
        PruningError: They would not have.
    """
    towers = {
        path: len(kept.get(path, layers))
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList) and len(layers) and type(layers[0]).__name__ in TOWERS
    }
    if len(set(towers.values())) > 1:
        left = " and ".join(f"{path!r} with {count} layers" for path, count in towers.items())
        raise PruningError(
            f"{type(model).__name__} would be left with {left}, and its code runs the layers of both towers by one count. Remove as "
            "many of both in the same call, by a dict: remove={path of one: [...], path of the other: [...]}."
        )


def _attention_layers(config: PreTrainedConfig) -> list[int] | None:
    """Layers of the decoder whose cache holds keys and values; None where no cache can be made from the config."""
    try:
        decoder = config.get_text_config(decoder=True)
        layers = DynamicCache(config=decoder).layers
    except Exception:  # of a model without a decoder, or with caches of its own
        return None
    # Early versions of Transformers 5 make a layer with keys and values for every layer of a hybrid.
    without = {
        i for i, kind in enumerate(getattr(decoder, "layer_types", None) or ()) if kind in ("linear_attention", "conv")
    }
    return [i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin) and i not in without]


def _cycles(period: int, what: str) -> Callable:
    def rule(_model, _path, num_layers: int, keep: Sequence[int]) -> None:
        kinds = [i % period for i in range(num_layers)]
        wanted = kinds[: len(keep)]
        if [kinds[i] for i in keep] != wanted:
            raise Refusal(f"{what} by its position, every {period} layers the same", kinds=kinds, wanted=wanted)

    return rule


def _only_the_last(model: PreTrainedModel, path: str, num_layers: int, keep: Sequence[int]) -> None:
    # A bare model has no such head.
    refines = getattr(model.get_submodule(path.rpartition(".")[0]), "bbox_embed", None) is not None
    if refines and list(keep) != list(range(len(keep))):
        raise Refusal(
            f"the code around {path!r} refines its predictions after every layer by a head that all share, so only the last "
            "layers can go",
            kinds=range(num_layers),
            wanted=range(len(keep)),
        )


def _halved_between(model: PreTrainedModel, path: str, num_layers: int, _keep: Sequence[int]) -> None:
    """Informer: behind every encoder layer but the last stands a convolution, in a list of its own."""
    if model.config.distil:
        raise Refusal(
            f"a convolution that halves the sequence stands between any two layers of {path!r} (distil=True), so none can go "
            "without another length for all behind it",
            needs=[{i} for i in range(num_layers)],
        )


def _first_pools(_model, path: str, _num_layers: int, keep: Sequence[int]) -> None:
    if not path.endswith(("blocks.0", "decoder.layers")) and keep[0] != 0:
        raise Refusal(f"the first layer of {path!r} halves the sequence, so it must stay", needs=[{0}])


def _paired_with_fusion(model: PreTrainedModel, path: str, num_layers: int, keep: Sequence[int]) -> None:
    """BridgeTower: the outputs of the last layers of both towers feed one layer each that fuses them.

    The first of these outputs is that of all layers before, of which any can go.
    """
    pinned = range(num_layers - model.config.num_hidden_layers + 1, num_layers)
    if any(i not in keep for i in pinned):
        raise Refusal(
            f"layers {list(pinned)} of {path!r} each feed a layer that fuses text and image, so they must stay",
            needs=[{i} for i in pinned],
        )


def _first_global_layer_is_read(model: PreTrainedModel, path: str, _num_layers: int, keep: Sequence[int]) -> None:
    """SAM-HQ's mask decoder reads the output of the first layer with global attention."""
    first = min(getattr(model.config, "vision_config", model.config).global_attn_indexes, default=None)
    if first is not None and first not in keep:
        raise Refusal(
            f"the mask decoder reads the output of the first layer of {path!r} with global attention, so layer {first} must "
            "stay",
            needs=[{first}],
        )


def _confidence_by_depth(_model, path: str, num_layers: int, _keep: Sequence[int]) -> None:
    """LightGlue: a layer's threshold is 0.8 + 0.1 exp(-4 i / L), in the code."""
    raise Refusal(
        f"the code around {path!r} stops early and drops keypoints by a confidence threshold that it computes from a layer's "
        "index and the number of layers, and returns how many a keypoint went through, so no layer can go without another "
        "result of those that stay",
        needs=[{i} for i in range(num_layers)],
    )


def _one_shared_block(model: PreTrainedModel, path: str, _num_layers: int, keep: Sequence[int]) -> None:
    """Zamba: Transformers looks for the copies of the shared block, and fails where there is none."""
    shared = [i for i, kind in enumerate(model.config.layers_block_type) if kind == "hybrid"]
    kept = [i for i in shared if i in keep]
    if len(kept) == 1 < len(shared):
        raise Refusal(
            f"layers {shared} of {path!r} share one attention block, and Transformers cannot build a model with a single one "
            "of them, so at least two must stay",
            needs=[set(kept), set(shared) - set(kept)],
        )


TOWERS = ("BridgeTowerTextLayer", "BridgeTowerResidualAttention")
RULES: dict[str, Callable[[PreTrainedModel, str, int, Sequence[int]], None]] = {
    "Mask2FormerMaskedAttentionDecoderLayer": _cycles(
        3, "a layer of the mask decoder reads a level of the image features"
    ),
    "OneFormerTransformerDecoderLayer": _cycles(3, "a layer of the mask decoder reads a level of the image features"),
    "PPDocLayoutV3DecoderLayer": _only_the_last,
    "DabDetrDecoderLayer": _only_the_last,
    "FunnelLayer": _first_pools,
    "InformerEncoderLayer": _halved_between,
    **dict.fromkeys(TOWERS, _paired_with_fusion),
    "SamHQVisionLayer": _first_global_layer_is_read,
    "LightGlueTransformerLayer": _confidence_by_depth,
    "ZambaMambaDecoderLayer": _one_shared_block,
    "ZambaHybridLayer": _one_shared_block,
}

"""Rules of the code around the layers, by class of the layer: no config field and no attribute of a layer shows them.

Each was found by a pruned model that computed something else than the original with the layers bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def _only_the_last(_model, path: str, num_layers: int, keep: Sequence[int]) -> None:
    if list(keep) != list(range(len(keep))):
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
    """BridgeTower: each of the last layers of both towers feeds one layer that fuses them."""
    first = num_layers - model.config.num_hidden_layers
    if path.startswith("bridgetower.") or "text_model" in path or "vision_model" in path:
        pinned = [i for i in range(num_layers) if i >= first]
        if any(i not in keep for i in pinned):
            raise Refusal(
                f"layers {pinned} of {path!r} each feed a layer that fuses text and image, so they must stay",
                needs=[{i} for i in pinned],
            )


def _global_layers_are_read(model: PreTrainedModel, path: str, _num_layers: int, keep: Sequence[int]) -> None:
    """SAM-HQ's mask decoder reads the output of every layer with global attention."""
    config = getattr(model.config, "vision_config", model.config)
    lost = [i for i in config.global_attn_indexes if i not in keep]
    if lost:
        raise Refusal(
            f"other parts read the output of every layer of {path!r} with global attention "
            f"(global_attn_indexes={list(config.global_attn_indexes)}), so layers {lost} must stay",
            needs=[{i} for i in lost],
        )


RULES: dict[str, Callable[[PreTrainedModel, str, int, Sequence[int]], None]] = {
    "Mask2FormerMaskedAttentionDecoderLayer": _cycles(
        3, "a layer of the mask decoder reads a level of the image features"
    ),
    "OneFormerTransformerDecoderLayer": _cycles(3, "a layer of the mask decoder reads a level of the image features"),
    "PPDocLayoutV3DecoderLayer": _only_the_last,
    "DabDetrDecoderLayer": _only_the_last,
    "FunnelLayer": _first_pools,
    "InformerEncoderLayer": _halved_between,
    "BridgeTowerTextLayer": _paired_with_fusion,
    "BridgeTowerResidualAttention": _paired_with_fusion,
    "SamHQVisionLayer": _global_layers_are_read,
}

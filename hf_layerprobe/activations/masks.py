"""Which tokens of a stack count in a forward pass, whatever the model does to its inputs before the stack sees them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..errors import LayerProbeError
from ..stacks import LayerStack


class TokenMasks:
    """Fits the masks that a model is called with to the tokens that one of its stacks sees.

    Args:
        stack: The layers whose tokens are asked for.
    """

    def __init__(self, stack: LayerStack):
        model, parts = stack.model, stack.path.split(".")
        self._path = stack.path
        self._signature = inspect.signature(model.forward)
        self._around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        sequence_to_sequence = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._decoder = sequence_to_sequence and "decoder" in parts
        self._described = self._decoder or _described(model, self._around)
        # Longformer, BigBird, LED and Reformer fill their inputs up to a multiple of their window, by a method.
        self._fills_up = any(name.startswith("_pad_to_") for module in self._around for name in dir(type(module)))
        self.end()

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Takes the arguments of a forward pass."""
        self.end()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = inputs | inputs.get("kwargs", {})
        self._cached = inputs.get("past_key_values") is not None
        if self._described:
            self._mask = self._mask_of(inputs)

    def end(self) -> None:
        """Forgets the pass."""
        self._mask: torch.Tensor | None = None
        self._cached = False
        self._fitted: dict[tuple, torch.Tensor | None] = {}

    def fit(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The mask for the residual stream at a layer.

        The device is waited for only where the mask that the model got does not fit, and then once a pass.

        Args:
            hidden: `[batch, tokens, hidden]`.

        Returns:
            `[batch, tokens]` on the stream's device, true for the tokens that count; `None` when all do.

        Raises:
            LayerProbeError: The model got a mask that leaves tokens out, and which of the stream's they are is unknown.
        """
        key = hidden.shape[:2], hidden.device
        if key not in self._fitted:
            mask = None if self._mask is None else self._fit(self._mask, *hidden.shape[:2])
            self._fitted[key] = None if mask is None else mask.to(hidden.device)
        return self._fitted[key]

    def _mask_of(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        mask = inputs.get("decoder_attention_mask" if self._decoder else "attention_mask")
        labels = inputs.get("labels")
        if mask is None and self._decoder:
            read = inputs.get("decoder_input_ids")
            if isinstance(labels, torch.Tensor) and labels.dim() == 2 and (read is None or read.shape == labels.shape):
                mask = labels != -100  # the decoder reads the labels shifted by one: as many tokens count
        elif mask is None and self._fills_up:
            tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
            mask = None if tokens is None else tokens.new_ones(tokens.shape[:2])
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:  # who may attend to whom: nobody does to padding
            added = mask.is_floating_point()
            mask = (mask > torch.finfo(mask.dtype).min / 2 if added else mask.bool()).any(1).any(1)
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() in (2, 3) else None

    def _fit(self, mask: torch.Tensor, rows: int, tokens: int) -> torch.Tensor | None:
        if mask.shape[-1] == tokens and mask.numel() == rows * tokens:
            return mask.reshape(rows, tokens)  # multiple choice: the choices become rows
        if mask.dim() != 2:
            return None
        if len(mask) == rows and self._cached and mask.shape[1] > tokens:
            return mask[:, -tokens:]  # the columns before are those of the cache
        if len(mask) == rows and self._fills_up and mask.shape[1] < tokens:
            return pad(mask, (0, tokens - mask.shape[1]))
        counted = int(mask.sum())
        packed = rows == 1 and counted == tokens  # the model has taken the padding out
        if packed or counted == mask.numel():
            return None
        frames = self._frames(mask, tokens) if len(mask) == rows else None
        if frames is None:
            name = "decoder_attention_mask" if self._decoder else "attention_mask"
            raise LayerProbeError(
                f"The {name} of shape {list(mask.shape)} leaves out padding, but the layers of {self._path!r} see "
                f"{[rows, tokens]} tokens, and which of those are padding is unknown. Pass batches without padding, such "
                "as one sequence a batch."
            )
        return frames

    def _frames(self, mask: torch.Tensor, frames: int) -> torch.Tensor | None:
        """The mask of an audio model's frames from that of its samples, both padded on the right."""
        for module in self._around:
            lengths = getattr(module, "_get_feat_extract_output_lengths", None)
            if lengths is None:
                continue
            # Layers see the frames before an adapter shortens them once more.
            options = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}
            whole, *counted = (int(lengths(torch.tensor(n), **options)) for n in (mask.shape[1], *mask.sum(1).tolist()))
            if whole == frames:
                return torch.arange(frames)[None] < torch.tensor(counted)[:, None]
        return None


def _described(model: nn.Module, around: list[nn.Module]) -> bool:
    """Whether the model's `attention_mask` is about this stack: that of a vision-language model is not about its tower."""
    inputs = (inspect.signature(module.forward).parameters for module in around)
    if any("pixel_values" in names and "input_ids" not in names for names in inputs):
        return False  # in Transformers 5.0 some towers are no models of their own
    owner = next((module for module in reversed(around) if isinstance(module, PreTrainedModel)), None)
    modalities = getattr(owner, "input_modalities", "text")
    reads_tokens = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return "text" in modalities or ("audio" in modalities and not reads_tokens)

"""The form in which layers hand on their states, and how it becomes `[batch, tokens, channels]`."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..errors import LayerProbeError
from ..stacks import LayerStack

# Their layers run on `[tokens, batch, hidden]`.
TOKENS_FIRST = ("transformers.models.xlnet.modeling_xlnet", "transformers.models.fsmt.modeling_fsmt")


class StreamForm:
    """Brings the states of a stack's layers into the form `[batch, tokens, channels]`.

    Args:
        stack: The layers.

    Attributes:
        tokens_first: Whether the layers run on `[tokens, batch, channels]`.
    """

    def __init__(self, stack: LayerStack):
        self.tokens_first = type(stack.layers[0]).__module__ in TOKENS_FIRST
        self._path = stack.path
        norms = (module for module in stack.layers[0].modules() if isinstance(module, nn.LayerNorm))
        width = next((norm.normalized_shape[-1] for norm in norms), None)
        self._image_width = width if _reads_images(stack) else None

    def as_batch(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states of a layer as `[batch, tokens, channels]`, a view where there is one; every place of an image is a token.

        Raises:
            LayerProbeError: Which dimension is which is not known.
        """
        if hidden.dim() == 2:  # packed sequences: [tokens, hidden]
            return hidden[None]
        if hidden.dim() == 3:
            return hidden.transpose(0, 1) if self.tokens_first else hidden
        if hidden.dim() == 4 and self._image_width is not None:
            first, last = (hidden.shape[place] == self._image_width for place in (1, 3))
            if first != last:  # where both are as wide as the norms it could be either
                return hidden.flatten(1, 2) if last else hidden.flatten(2).transpose(1, 2)
        raise LayerProbeError(
            f"The layers of {self._path!r} hand on states of shape {list(hidden.shape)}, and activations are scored token by "
            "token, [batch, tokens, channels]; which of these dimensions is which is not known for this architecture. "
            "'docs' scores its layers by their weights."
        )


def _reads_images(stack: LayerStack) -> bool:
    """Whether a model or tower around the layers reads images and no text."""
    parts = stack.path.split(".")
    around = (stack.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    inputs = (inspect.signature(module.forward).parameters for module in around)
    return any("pixel_values" in names and "input_ids" not in names for names in inputs)

"""Where inside a layer activations are taken: its output, its update, and the sublayers, found by structure and names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import LayerProbeError
from ..stacks import LayerStack
from ..stacks.bypass import hidden_output
from ..weights.naming import CROSS_ATTENTION, find_modules

# "layer": what leaves the layer. "update": what it adds to the stream, output − input. "attention" and "mlp": what the
# (self-)attention and the MLP hand on, before a norm or residual connection that follows; of a mixture of experts, the
# whole block's output. "mlp-inner": what enters the MLP's down projection.
SITES = ("layer", "update", "attention", "mlp", "mlp-inner")
SUBLAYERS = ("attention", "mlp", "mlp-inner")

EXPERTS = re.compile(r"(^|\.)\w*expert")
# Names of a whole sublayer, for layers whose projections are not in the table of names.
BLOCKS = {
    "attention": re.compile(r"^(self_attn|self_attention|attn|attention)$"),
    "mlp": re.compile(r"^(mlp|ffn|ff|feed_forward|feedforward|block_sparse_moe|moe)$"),
}


@dataclass(frozen=True)
class Tap:
    """The place that a site is read at.

    Attributes:
        name: The module's name in its layer.
        module: The module.
        inward: Whether the module's input is meant, rather than its output.
    """

    name: str
    module: nn.Module
    inward: bool = False

    def register(self, take: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Hands `take` every activation here, until the handle is removed."""
        if self.inward:
            return self.module.register_forward_pre_hook(lambda _module, args: take(args[0].detach()))
        # A copy: Falcon's layers add the attention's output to the MLP's in place.
        return self.module.register_forward_hook(
            lambda _module, _args, output: take(hidden_output(output).detach().clone())
        )

    def fit(self, taken: list[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """What was taken in one pass of the layer, token by token; `taken` is emptied.

        Args:
            taken: The activations of each time that the module ran.
            hidden: The stream at the layer, `[batch, tokens, hidden]`.

        Returns:
            `[batch, tokens, width]`.

        Raises:
            LayerProbeError: The module did not run once, on these tokens.
        """
        shapes = [list(tensor.shape) for tensor in taken]
        rows = hidden.shape[:2]
        one_each = len(taken) == 1 and taken[0][..., 0].numel() == rows.numel()
        # Windows of an image are rows of their own, and their tokens in another order.
        in_order = one_each and (taken[0].dim() == 2 or len(taken[0]) == len(hidden))
        if not in_order or not (self.inward or shapes[0][-1] == hidden.shape[-1]):
            raise LayerProbeError(
                f"{self.name!r} was expected to run once on the {list(hidden.shape)} states of its layer; it ran "
                f"{len(taken)} times{' on ' if shapes else ''}{', '.join(map(str, shapes))}. Measure at another site."
            )
        return taken.pop().reshape(*rows, -1)  # experts see one row of tokens


def find_taps(stack: LayerStack, site: str) -> list[Tap]:
    """The place in each layer of the stack that a site of a sublayer is read at.

    Args:
        stack: The layers.
        site: `"attention"`, `"mlp"` or `"mlp-inner"`.

    Raises:
        LayerProbeError: Some layers have no such sublayer, or several, or it is a mixture of experts, each of which has
            inner activations of its own. The message names the layers and what they have.
    """
    taps, missing = [], {}
    for index, layer in enumerate(stack.layers):
        try:
            taps.append(_tap(layer, site))
        except _NoTapError as error:
            missing.setdefault((type(layer).__name__, str(error)), []).append(index)
    if missing:
        reasons = "; ".join(f"layers {layers} ({kind}): {why}" for (kind, why), layers in missing.items())
        raise LayerProbeError(
            f"Site {site!r} cannot be measured in {stack.path!r}: {reasons}. The sites 'layer' and 'update' exist in every "
            "layer."
        )
    return taps


class _NoTapError(Exception):
    """Why a layer has no such site."""


def _tap(layer: nn.Module, site: str) -> Tap:
    names = {module: name for name, module in layer.named_modules()}
    kind = "o" if site == "attention" else "down"
    found = [(names[weight.owner], weight) for weight in find_modules(layer) if kind in weight.kinds]
    experts = site != "attention" and any(
        EXPERTS.search(name) and not CROSS_ATTENTION.search(name) for name in names.values()
    )
    if experts:
        if site == "mlp-inner":
            raise _NoTapError("a mixture of experts, each of which has inner activations of its own for its own tokens")
        return _expert_block(layer, names)
    owners = list(dict.fromkeys(name for name, _ in found))
    if not owners and site != "mlp-inner":
        owners = [name for name, _ in layer.named_children() if BLOCKS[site].match(name)]
    if len(owners) != 1:
        children = ", ".join(name for name, _ in layer.named_children())
        raise _NoTapError(
            f"several such modules ({', '.join(owners)})" if owners else f"no such module among {children}"
        )
    return Tap(owners[0], layer.get_submodule(owners[0]), inward=site == "mlp-inner")


def _expert_block(layer: nn.Module, names: dict[nn.Module, str]) -> Tap:
    """The module around all experts, shared ones included, whose output is that of the mixture."""
    inside = {name for name in names.values() if EXPERTS.search(name)}
    blocks = {name[: EXPERTS.search(name).start()] for name in inside}
    dense = [
        name
        for name in (names[w.owner] for w in find_modules(layer) if "down" in w.kinds)
        if not any(block and (name == block or name.startswith(f"{block}.")) for block in blocks)
    ]
    if len(blocks) != 1 or "" in blocks or dense:
        raise _NoTapError(f"experts that are not inside one block ({', '.join(sorted([*blocks, *dense]))})")
    return Tap(block := blocks.pop(), layer.get_submodule(block))

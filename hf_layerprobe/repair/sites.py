"""Where a layer can be repaired: the last matrix that writes into the residual stream, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import LayerProbeError
from ..weights.naming import find_modules

# Whether the matrix's output is simply added shows when it is changed by this share of the stream's size.
PROBE = 0.25


@dataclass
class Site:
    """The `down` matrix of one layer.

    Attributes:
        layer: The layer.
        matrix: The module whose weight (and bias, if it has one) is fitted.
        norm: The LayerNorm that the layer ends with, as in BERT; None where the layer ends with the sum itself.
    """

    layer: nn.Module
    matrix: nn.Module
    norm: nn.LayerNorm | None = None

    def observe(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer once.

        Args:
            run: Runs the layer and returns the stream after it.

        Returns:
            What the matrix reads, `[batch, tokens, in]`, and the sum that it adds to, before a norm, `[batch, tokens,
            hidden]`.
        """
        seen: dict[str, torch.Tensor] = {}
        handles = [self.matrix.register_forward_pre_hook(lambda _m, args: seen.update(read=args[0]))]
        if self.norm is not None:
            handles.append(self.norm.register_forward_pre_hook(lambda _m, args: seen.update(sum=args[0])))
        try:
            after = run()
        finally:
            for handle in handles:
                handle.remove()
        return seen["read"], seen.get("sum", after)

    def wanted(self, total: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The sum that would give `target` after the layer's norm, with the mean and spread that the sum has."""
        if self.norm is None:
            return target
        gain = self.norm.weight
        gain = torch.where(gain.abs() < 1e-3, torch.full_like(gain, 1e-3), gain)
        shape = (target - self.norm.bias) / gain
        return total.mean(-1, keepdim=True) + total.std(-1, correction=0, keepdim=True) * shape

    def written(self) -> torch.Tensor:
        """The matrix as it is, its bias in the last row if it has one, `[in (+ 1), hidden]`."""
        weight = self.matrix.weight if isinstance(self.matrix, Conv1D) else self.matrix.weight.T
        rows = weight if self.matrix.bias is None else torch.cat([weight, self.matrix.bias[None]])
        return rows.detach().float()

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the matrix's weight and bias."""
        return {name: tensor.clone() for name, tensor in self.matrix.state_dict().items()}

    def set(self, state: dict[str, torch.Tensor], change: torch.Tensor) -> None:
        """Sets the matrix to a state plus a change, `[in (+ 1 with a bias), hidden]`."""
        transposed = isinstance(self.matrix, Conv1D)  # stored as [in, out]
        rows = change[: self.matrix.weight.shape[0 if transposed else 1]]
        changes = {"weight": rows if transposed else rows.T, "bias": change[-1]}
        self.matrix.load_state_dict({name: tensor + changes[name].to(tensor) for name, tensor in state.items()})
        torch.clear_autocast_cache()  # under a caller's autocast, the layer would go on with a copy of the old weight


def find_site(layer: nn.Module, run: Callable[[], torch.Tensor]) -> Site:
    """The place to repair in a layer.

    Args:
        layer: A layer, in evaluation mode.
        run: Runs it on some batch and returns the stream after it.

    Raises:
        LayerProbeError: The layer has no single `down` matrix (a mixture of experts), or what it writes is not added to
            the stream as it is (Gemma's norms after the sublayers).
    """
    matrices = [each.owner for each in find_modules(layer) if "down" in each.kinds and each.packing == "rows"]
    name = type(layer).__name__
    if len(matrices) != 1 or not isinstance(matrices[0], (nn.Linear, Conv1D)):
        raise LayerProbeError(
            f"{name} has {len(matrices)} plain down matrices (a mixture of experts has none); closed-form repair fits "
            "exactly one a layer. Leave repair= out, or use repair='lora'."
        )
    plain = run()
    norms = []

    def last_norm(module, args, output):
        if torch.equal(output, plain):
            norms.append(module)

    handles = [m.register_forward_hook(last_norm) for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    site = Site(layer, matrices[0], norms[-1] if norms else None)
    _, before = site.observe(run)
    step = PROBE * before.float().square().mean().sqrt().item()
    handle = site.matrix.register_forward_hook(lambda _m, _a, output: output + step)
    try:
        _, after = site.observe(run)
    finally:
        handle.remove()
    # The median: rounding in half precision moves what is large.
    if not ((after.float() - before.float()) / step - 1).abs().median() < 0.1:
        raise LayerProbeError(
            f"{name} does not add the output of its down matrix to the stream as it is (a norm or a scale comes after), so "
            "it cannot be fitted in closed form. Leave repair= out, or use repair='lora'."
        )
    return site

"""A bounded random sample of tokens with their states before, between and after the layers."""

from __future__ import annotations

import torch

from ..errors import LayerProbeError
from .data import check_positive

EMPTY = torch.iinfo(torch.int64).max


class TokenSample:
    """Keeps the states of at most `size` tokens, every token as likely as any other; for scores that need points.

    Which tokens are kept depends on their place in the data alone, not on batches or padding. Nothing waits for the
    device. The memory is `size` × (layers + 1) × hidden in the precision of the activations, such as 37 MB for 512 tokens
    of 30 layers of 576 channels in float32.

    Args:
        num_layers: Number of layers.
        size: Tokens to keep.
        seed: Another one keeps other tokens.
    """

    def __init__(self, num_layers: int, *, size: int = 512, seed: int = 0):
        check_positive(size=size)
        self.num_layers = num_layers
        self.size = size
        self.seed = seed % 2**32
        self.seen: int | torch.Tensor = 0  # tokens so far
        self.keys: torch.Tensor | None = None  # [size]; the kept tokens are those with the smallest keys
        self.rows: list[torch.Tensor | None] = [None] * (num_layers + 1)  # [size, hidden] each

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        if layer == 0:
            self._choose(before, mask)
        self._keep(layer, before)
        if layer == self.num_layers - 1:
            self._keep(layer + 1, after)

    def states(self, at_least: int = 1) -> list[torch.Tensor]:
        """What enters each layer, and what leaves the last one: `[tokens, hidden]` each, in the same order of tokens.

        Raises:
            LayerProbeError: Fewer tokens than a score needs.
        """
        used = torch.empty(0) if self.keys is None else self.keys != EMPTY
        if used.sum() < at_least:
            raise LayerProbeError(
                f"This score compares tokens and needs at least {at_least} of them; the data have {int(used.sum())}, or "
                f"size={self.size} keeps fewer."
            )
        return [rows[used.to(rows.device)] for rows in self.rows]

    def merge(self, other: TokenSample) -> None:
        """Adds what another one of the same size has seen: of both, the tokens with the smallest keys."""
        if self.keys is None or other.keys is None:
            if other.keys is not None:
                self.load_state_dict(other.state_dict())
            return
        self.seen = self.seen + torch.as_tensor(other.seen).to(self.keys.device)
        self.keys, chosen = torch.cat([self.keys, other.keys.to(self.keys.device)]).topk(self.size, largest=False)
        self.rows = [
            torch.cat([mine, theirs.to(mine.device)])[chosen.to(mine.device)]
            for mine, theirs in zip(self.rows, other.rows, strict=True)
        ]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`seen`, `keys` `[size]` and `rows` `[layers + 1, size, hidden]` on the CPU; without tokens, `seen` alone."""
        if self.keys is None:
            return {"seen": torch.tensor(0)}
        rows = torch.stack([rows.cpu() for rows in self.rows])
        return {"seen": torch.as_tensor(self.seen).cpu(), "keys": self.keys.cpu(), "rows": rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen, self.keys = state["seen"], state.get("keys")
        self.rows = list(state["rows"].clone()) if "rows" in state else [None] * (self.num_layers + 1)

    def _choose(self, before: torch.Tensor, mask: torch.Tensor | None) -> None:
        counted = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device) if mask is None else mask
        counted = counted.flatten()
        place = self.seen + counted.cumsum(0)  # [batch × tokens], from 1
        self.seen = place[-1]
        keys = torch.where(counted, _scattered(place, self.seed), EMPTY)
        if self.keys is None:
            self.keys = torch.full((self.size,), EMPTY, device=before.device)
        self.keys, self._chosen = torch.cat([self.keys, keys]).topk(self.size, largest=False)

    def _keep(self, state: int, hidden: torch.Tensor) -> None:
        hidden = hidden.flatten(0, 1)
        kept = self.rows[state]
        if kept is None:
            kept = hidden.new_zeros(self.size, hidden.shape[-1])
        chosen = self._chosen.to(hidden.device)
        old = kept[chosen.clamp(max=self.size - 1)]
        new = hidden[(chosen - self.size).clamp(min=0)]
        self.rows[state] = torch.where(chosen[:, None] < self.size, old, new)


def _scattered(place: torch.Tensor, seed: int) -> torch.Tensor:
    """A pseudo-random key for each place, by the mixer of SplitMix64; int64 arithmetic wraps around."""
    key = (place + seed * 0x632BE5AB) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        key = (key ^ (key >> shift)) * factor
    return key ^ (key >> 31)

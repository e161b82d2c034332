"""How much attention and MLP turn the stream, each for itself (LLM-Drop, arXiv 2406.15786)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ..activations import Resumable, TokenMean
from ..activations.moments import squares_in_single, token_squares
from ..errors import LayerProbeError
from ..precision import widest
from .influence import turned
from .registry import register

SOURCE = "sublayer influence, LLM-Drop, arXiv 2406.15786"


class SublayerInfluence(Resumable):
    """1 − mean over tokens of cos(y, y + f), where the sublayer adds its output f to the stream y.

    For attention y enters the layer; for the MLP y + f leaves it. That needs a layer which adds both outputs to the
    stream as they are, x_out = x_in + attention + MLP, one after the other or side by side; whether it does is measured.
    """

    sites = ("attention", "mlp")

    def __init__(self, num_layers: int):
        self.turns = {site: TokenMean(num_layers) for site in self.sites}
        self.rest = TokenMean(num_layers)  # what the layer adds besides, in units of the stream and of its precision

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None, **sites: torch.Tensor
    ) -> None:
        attention, mlp = sites.values()
        # float32 does for what is added; of the stream a difference is taken.
        added = {site: squares_in_single(values) for site, values in sites.items()}
        entering, leaving = token_squares(before), token_squares(after)
        # ‖y + f‖² from lengths that others may have asked for already: 2‖y‖² + 2‖f‖² − ‖f − y‖².
        with_attention = 2 * (entering + added["attention"]) - token_squares(attention, before)
        # The same, but for how a stream of half precision is rounded before the MLP is added.
        without_mlp = with_attention if after.dtype == torch.float32 else token_squares(after, mlp)
        for site, one, other in (("attention", entering, with_attention), ("mlp", without_mlp, leaving)):
            self.turns[site].update(layer, turned(one, other, added[site]), mask)
        # A few tokens show how the layer is built.
        rounding = torch.finfo(after.dtype).eps
        before, after, attention, mlp = (x[:, ::16].to(widest(x.device)) for x in (before, after, attention, mlp))
        rest, stream = (torch.linalg.vector_norm(x, dim=-1) for x in (after - before - attention - mlp, after))
        rest = rest / stream.clamp_min(torch.finfo(torch.float32).tiny) / rounding
        self.rest.update(layer, rest, None if mask is None else mask[:, ::16])

    def compute(self, site: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        others = np.flatnonzero(self.rest.mean() > 4).tolist()
        if others:
            raise LayerProbeError(
                f"influence-{site} asks what the stream is without one sublayer, but layers {others} add something else to "
                "the stream than the outputs of attention and MLP: a norm or a scale follows, or there is another "
                "sublayer. 'influence' measures the whole layer."
            )
        return self.turns[site].mean(), {}


for _site in SublayerInfluence.sites:
    register(
        f"influence-{_site}",
        SublayerInfluence,
        read=partial(SublayerInfluence.compute, site=_site),
        source=SOURCE,
        higher_is_more_important=True,
        needs_data=True,
    )

"""AVSS, activation variance over sparsity (arXiv 2411.02117): as published, as released, and relative to the stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..activations import SITES, SUBLAYERS, Resumable, RunningStatistics, TokenMean
from ..activations.largest import LargestShare
from ..activations.moments import token_rms, token_sums
from ..errors import LayerProbeError
from ..stacks import LayerStack
from .registry import OURS, register
from .results import LayerScores
from .run import score_layers

PAPER = "AVSS, arXiv 2411.02117"
EPS = {"published": 1e-5, "released": 1e-5, "relative": 0.05}
# Where the robust form limits an update, in units of the stream: three times as large as what it is added to.
CLIP = 3.0


class PooledAVSS(Resumable):
    """The published formula over all values of a layer's tokens, of its output or of its relative update.

    Args:
        num_layers: Number of layers.
        eps: Values below this magnitude count as inactive.
        site: Which activations; see [`score_layers`].
        relative: Take them in units of rms(x_in), token by token.
        clip: Then limit their magnitude to this.

    Raises:
        LayerProbeError: `eps` or `clip` is not positive.
    """

    def __init__(self, num_layers: int, *, eps: float, site: str, relative: bool, clip: float | None = None):
        self.eps = check_eps(eps)
        self.clip = None if clip is None else check_eps(clip, "clip")
        self.site = site
        self.sites = (site,) if site in SUBLAYERS else ()
        self.relative = relative
        self.asks = 1 if clip is None else 2
        self.statistics = RunningStatistics(num_layers)
        self.largest = LargestShare(num_layers)
        self.clipped = TokenMean(num_layers)  # what the limit takes from the squares of a token

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None, **sites: torch.Tensor
    ) -> None:
        values, minus = sites.get(self.site, after), before if self.site == "update" else None
        width = values.shape[-1]
        unit = token_rms(before) if self.relative else None
        found = token_sums(values, minus, below=self.eps, unit=unit, clip=self.clip)
        sums, squares, largest = found.sums, found.squares, found.largest
        if self.relative:
            sums, squares, largest = sums / unit, squares / unit / unit, largest / unit
        if self.clip is not None:
            whole = squares
            sums, squares = found.limited
            sums, squares, largest = sums / unit, squares / unit / unit, largest.clamp_max(self.clip)
            self.clipped.update(layer, whole - squares, mask)
        self.largest.update(layer, largest, squares, width, mask)
        means = sums / width
        weight = torch.full_like(means, width) if mask is None else mask * width
        self.statistics.update(layer, means, squares / width - means.square(), found.small, weight)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        variance, sparsity = (t.cpu().numpy() for t in (self.statistics.variance(), self.statistics.share_small()))
        values, details = avss_from(variance, sparsity)
        details["largest_share_at_least"], details["largest_share_at_most"] = self.largest.bounds()
        if self.clip is not None:
            state = self.statistics.state_dict()
            kept = state["deviation"] + state["count"] * state["mean"].square()
            taken = self.clipped.state_dict()["sums"]
            details["clipped_share"] = (taken / (taken + kept)).numpy()
        return values, details


class ReleasedAVSS(Resumable):
    """What the authors' released code measures: padding counts, and batches are averaged without weights.

    The variance (unbiased) is over the hidden dimension of the state averaged over the sequence, then averaged over
    the batch.

    Args:
        num_layers: Number of layers.
        eps: Values below this magnitude count as inactive.
        site: `"layer"`, where the authors measure.

    Raises:
        LayerProbeError: `eps` is not positive.
    """

    def __init__(self, num_layers: int, *, eps: float = EPS["released"], site: str = "layer"):
        self.eps = check_eps(eps)
        # Each batch counts as one token, with the numbers of the whole batch.
        self.variance, self.sparsity, self.values = (TokenMean(num_layers) for _ in range(3))

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        small = token_sums(after, below=self.eps).small
        self.variance.update(layer, after.float().mean(1).var(1).mean()[None], None)
        self.sparsity.update(layer, (small.sum() / after.numel())[None], None)
        self.values.update(layer, torch.full_like(small[0, :1], after.numel()), None)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        smallest = 1 / self.values.state_dict()["sums"].numpy()
        return avss_from(self.variance.mean(), np.maximum(self.sparsity.mean(), smallest), normalise=False)


def check_eps(eps: float, name: str = "eps") -> float:
    """The threshold of inactivity, or another one, if it can be one.

    Raises:
        LayerProbeError: It is not positive.
    """
    if not eps > 0:
        raise LayerProbeError(f"{name} must be positive, got {eps}.")
    return eps


def published(num_layers: int, *, eps: float = EPS["published"], site: str = "layer") -> PooledAVSS:
    """The variant `"published"` of [`avss`]."""
    return PooledAVSS(num_layers, eps=eps, site=site, relative=False)


def relative(num_layers: int, *, eps: float = EPS["relative"], site: str = "update") -> PooledAVSS:
    """The variant `"relative"` of [`avss`]."""
    return PooledAVSS(num_layers, eps=eps, site="update" if site == "layer" else site, relative=True)


def limited(num_layers: int, *, eps: float = EPS["relative"], clip: float = CLIP, site: str = "update") -> PooledAVSS:
    """The relative variant with limited magnitudes; see `robust` of [`avss`]."""
    return PooledAVSS(num_layers, eps=eps, site="update" if site == "layer" else site, relative=True, clip=clip)


def avss_from(
    variance: np.ndarray, sparsity: np.ndarray, *, normalise: bool = True
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """AVSS of each layer from its variance and sparsity, with the paper's normalised and cumulative forms.

    The released code does not divide variance and sparsity by their sums over layers first; the normalised form is the
    same either way.
    """
    # A layer that is not finite stays so alone, so that it can be named.
    scores = variance / sparsity
    if normalise:
        scores = (variance / np.nansum(variance)) / (sparsity / np.nansum(sparsity))
    normalised = scores / np.nansum(scores)
    return scores, {
        "variance": variance,
        "sparsity": sparsity,
        "normalised": normalised,
        "cumulative": np.cumsum(normalised),
    }


def avss(
    model: nn.Module,
    data: Any,
    *,
    variant: str = "relative",
    eps: float | None = None,
    site: str = "layer",
    robust: bool = False,
    stack: str | LayerStack | None = None,
    tokenizer=None,
    **options: Any,
) -> LayerScores:
    """Activation variance over sparsity of every layer, in one pass over the data.

    Args:
        model: The model; run in eval mode and left as it was.
        data: Texts, a `datasets.Dataset`, or batches of model inputs; see [`score_layers`].
        variant: `"published"` is the paper's formula (arXiv 2411.02117): variance and share of values below `eps` of a
            layer's output over all its tokens, each divided by its sum over layers, then the ratio. `"released"` is what
            the authors' code computes. `"relative"` (our own definition, the default) is the published ratio on the
            layer's update in units of the stream it is added to, which makes it independent of the stream's growth with
            depth. The published form almost always calls the first layers the least important; removing those ruins a
            model. Another `eps` or `site` than its own makes a variant our own definition, and its `source` says so.
        eps: Threshold of inactivity; 1e-5 by default, 0.05 for the relative variant. A layer without a single value
            below it counts as having one.
        site: Which activations are measured; see [`score_layers`]. The relative variant is about what is added to the
            stream, so that `"layer"` means `"update"` there, and takes the sublayers' outputs in units of the layer's
            input; `"mlp-inner"` is not added to the stream. The released variant is the authors' at `"layer"` alone.
        robust: Limit what massive activations can do (our own definition, of the relative variant alone): an update of
            more than 3 times the stream that it is added to (rms over the token's channels) counts as 3 times; another
            limit is `clip=`. `details["clipped_share"]` is the share of the second moment that the limit has taken.
        stack: Path of the stack; the main one by default.
        tokenizer: Needed for texts.
        options: `batch_size`, `max_length`, `pack`, `max_tokens`; see [`score_layers`].

    Returns:
        Scores, higher is more important; `details` has variance, sparsity, normalised and cumulative AVSS, and (but for
        the released variant) `largest_share_at_least` and `largest_share_at_most`, bounds of the share of the second
        moment that the largest 0.1 % of the values contribute. Where that is half or more, `notes` says so.

    Raises:
        LayerProbeError: Unknown variant, site or option, `eps` that is not positive, no data, weights not in memory, or
            activations that are not finite.
    """
    if variant not in EPS:
        raise LayerProbeError(f"Unknown AVSS variant {variant!r}; the variants are {', '.join(EPS)}.")
    if robust and variant != "relative":
        raise LayerProbeError(f"The robust form is one of the relative variant; got variant={variant!r}.")
    if eps is not None:
        options["eps"] = eps
    name = "avss-robust" if robust else f"avss-{variant}"
    return score_layers(model, data, by=name, site=site, stack=stack, tokenizer=tokenizer, **options)


for _name, _make, _source, _sites in (
    ("avss-published", published, PAPER, SITES),
    ("avss-released", ReleasedAVSS, f"{PAPER}, the authors' released code", ("layer",)),
    ("avss-relative", relative, OURS, ("update", "layer", "attention", "mlp")),
    ("avss-robust", limited, OURS, ("update", "layer", "attention", "mlp")),
):
    register(_name, _make, source=_source, higher_is_more_important=True, needs_data=True, sites=_sites)

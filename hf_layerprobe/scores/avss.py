"""AVSS, activation variance over sparsity (arXiv 2411.02117): as published, as released, and relative to the stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..activations import SITES, SUBLAYERS, RunningStatistics
from ..errors import LayerProbeError
from ..precision import widest
from ..stacks import LayerStack
from .registry import OURS, register
from .results import LayerScores
from .run import score_layers

PAPER = "AVSS, arXiv 2411.02117"
EPS = {"published": 1e-5, "released": 1e-5, "relative": 0.05}


class PooledAVSS:
    """The published formula over all values of a layer's tokens, of its output or of its relative update.

    Args:
        num_layers: Number of layers.
        eps: Values below this magnitude count as inactive.
        site: Which activations; see [`score_layers`].
        relative: Take them in units of rms(x_in), token by token.

    Raises:
        LayerProbeError: `eps` is not positive.
    """

    def __init__(self, num_layers: int, *, eps: float, site: str, relative: bool):
        self.eps = check_eps(eps)
        self.site = site
        self.sites = (site,) if site in SUBLAYERS else ()
        self.relative = relative
        self.statistics = RunningStatistics(num_layers)

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None, **sites: torch.Tensor
    ) -> None:
        # float64: in float32 the rounding of the stream moves values across eps, and their share is small.
        before, values = (x.to(widest(x.device)) for x in (before, sites.get(self.site, after)))
        if self.site == "update":
            values = values - before
        if self.relative:
            rms = torch.linalg.vector_norm(before, dim=-1, keepdim=True) / before.shape[-1] ** 0.5  # [batch, tokens, 1]
            values = values / rms.clamp_min(torch.finfo(torch.float32).tiny)
        variances, means = torch.var_mean(values, dim=-1, correction=0)  # [batch, tokens]
        small = (values.abs() < self.eps).sum(-1)
        weight = torch.full_like(means, values.shape[-1]) if mask is None else mask * values.shape[-1]
        self.statistics.update(layer, means, variances, small, weight)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return avss_from(self.statistics.variance().cpu().numpy(), self.statistics.share_small().cpu().numpy())


class ReleasedAVSS:
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
        self.batches = torch.zeros(num_layers, dtype=torch.float64)
        self.values = torch.zeros(num_layers, dtype=torch.float64)
        self.variance = torch.zeros(num_layers, dtype=torch.float64)
        self.sparsity = torch.zeros(num_layers, dtype=torch.float64)

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        after = after.float()
        self.batches[layer] += 1
        self.values[layer] += after.numel()
        self.variance[layer] += after.mean(1).var(1).mean().cpu()
        self.sparsity[layer] += (after.abs() < self.eps).sum().cpu().double() / after.numel()

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        sparsity = torch.maximum(self.sparsity / self.batches, 1 / self.values)
        return avss_from((self.variance / self.batches).numpy(), sparsity.numpy(), normalise=False)


def check_eps(eps: float) -> float:
    """The threshold of inactivity, if it can be one.

    Raises:
        LayerProbeError: It is not positive.
    """
    if not eps > 0:
        raise LayerProbeError(f"eps must be positive, got {eps}.")
    return eps


def published(num_layers: int, *, eps: float = EPS["published"], site: str = "layer") -> PooledAVSS:
    """The variant `"published"` of [`avss`]."""
    return PooledAVSS(num_layers, eps=eps, site=site, relative=False)


def relative(num_layers: int, *, eps: float = EPS["relative"], site: str = "update") -> PooledAVSS:
    """The variant `"relative"` of [`avss`]."""
    return PooledAVSS(num_layers, eps=eps, site="update" if site == "layer" else site, relative=True)


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
            model.
        eps: Threshold of inactivity; 1e-5 by default, 0.05 for the relative variant. A layer without a single value
            below it counts as having one.
        site: Which activations are measured; see [`score_layers`]. The relative variant is about what is added to the
            stream, so that `"layer"` means `"update"` there, and takes the sublayers' outputs in units of the layer's
            input; `"mlp-inner"` is not added to the stream. The released variant is the authors' at `"layer"` alone.
        stack: Path of the stack; the main one by default.
        tokenizer: Needed for texts.
        options: `batch_size`, `max_length`, `pack`, `max_tokens`; see [`score_layers`].

    Returns:
        Scores, higher is more important; `details` has variance, sparsity, normalised and cumulative AVSS.

    Raises:
        LayerProbeError: Unknown variant, site or option, `eps` that is not positive, no data, weights not in memory, or
            activations that are not finite.
    """
    if variant not in EPS:
        raise LayerProbeError(f"Unknown AVSS variant {variant!r}; the variants are {', '.join(EPS)}.")
    if eps is not None:
        options["eps"] = eps
    return score_layers(model, data, by=f"avss-{variant}", site=site, stack=stack, tokenizer=tokenizer, **options)


for _name, _make, _source, _sites in (
    ("avss-published", published, PAPER, SITES),
    ("avss-released", ReleasedAVSS, f"{PAPER}, the authors' released code", ("layer",)),
    ("avss-relative", relative, OURS, ("update", "layer", "attention", "mlp")),
):
    register(_name, _make, source=_source, higher_is_more_important=True, needs_data=True, sites=_sites)

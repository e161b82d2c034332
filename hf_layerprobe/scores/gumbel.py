"""Maximum-likelihood fit of the Gumbel (maximum) distribution, many samples at once."""

from __future__ import annotations

import math

import torch

MAX_STEPS = 100
# A step this small, relative to the scale, is the last: each squares the error of the one before, so 1e-10 is left.
NEAR = 1e-5


def gumbel_fit(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Location u and scale β of the Gumbel distribution that maximises the likelihood of each sample.

    The scale β is the only root of g(β) = β − mean(s) + Σ s·e^(−s/β) / Σ e^(−s/β); g is increasing, with
    g′ = 1 + Var_w(s)/β² for the weights w ∝ e^(−s/β), so Newton's method inside a shrinking bracket always arrives.
    Then u = −β·ln mean(e^(−s/β)). A sample without spread has no scale; its location is its value.

    Args:
        samples: `[..., m]`, any floating dtype; the arithmetic is float64.

    Returns:
        `[...]` and `[...]`, float64.
    """
    samples = samples.to("cpu" if samples.device.type == "mps" else samples.device)
    low, high = samples.amin(-1).double(), samples.amax(-1).double()
    flat = high - low <= 1e-12 * torch.maximum(high, -low).clamp_min(1)
    s = samples.double() - low[..., None]  # the likelihood does not care, and the exponentials stay within [0, 1]
    shifted_mean = s.mean(-1)
    # g(0+) < 0 and g(mean) >= 0 in shifted units, since the weighted mean is never negative.
    lower, upper = torch.zeros_like(shifted_mean), shifted_mean.clamp_min(1e-300)
    deviation = (s.square().mean(-1) - shifted_mean.square()).clamp_min(0).sqrt()
    beta = (deviation * math.sqrt(6) / math.pi).clamp_min(1e-300).minimum(upper)
    weights = torch.empty_like(s)
    settled = flat.clone()  # a fit that has arrived does not move on, so that it does not depend on its batch
    for _ in range(MAX_STEPS):
        torch.mul(s, -beta[..., None].reciprocal(), out=weights).exp_()  # 1 for the smallest value: their sum is not 0
        total = weights.sum(-1)
        weighted_mean = weights.mul_(s).sum(-1) / total
        variance = (weights.mul_(s).sum(-1) / total - weighted_mean.square()).clamp_min(0)
        g = beta - shifted_mean + weighted_mean
        lower, upper = torch.where(g < 0, beta, lower), torch.where(g < 0, upper, beta)
        step = beta - g / (1 + variance / beta.square())
        step = torch.where((step > lower) & (step < upper), step, (lower + upper) / 2)
        arrived = (step - beta).abs() <= NEAR * beta
        beta = torch.where(settled, beta, step)
        settled = settled | arrived
        if bool(settled.all()):
            break
    location = low - beta * torch.mul(s, -beta[..., None].reciprocal(), out=weights).exp_().mean(-1).log()
    return torch.where(flat, low + shifted_mean, location), torch.where(flat, 0, beta)

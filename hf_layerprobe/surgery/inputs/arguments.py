"""What models ask for beside text, images and sound, by the names of the arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .sizes import Sizes

Inputs = dict[str, torch.Tensor]
TOKENS = 12
BATCH = 2

Rand = Callable[..., torch.Tensor]


def boxes(random: torch.Generator) -> torch.Tensor:
    """One box a token: left, top, right, bottom in thousandths."""
    corners = torch.randint(0, 1000, (BATCH, TOKENS, 2, 2), generator=random).sort(dim=-2)[0]
    return corners.reshape(BATCH, TOKENS, 4) // 10


def argument(name: str, sizes: Sizes, ids: Callable[[], torch.Tensor], random: torch.Generator) -> torch.Tensor | None:
    """A value for a required argument; None for one that is not known."""
    rand: Rand = lambda *shape: torch.rand(shape, generator=random) - 0.5  # noqa: E731
    width = sizes.get("hidden_size", "d_model", "n_embd", default=64)
    if name.endswith("input_ids"):
        return ids()
    if name.endswith("attention_mask"):
        return torch.ones((BATCH, TOKENS), dtype=torch.long)
    if name in ("inputs_embeds", "hidden_states", "last_hidden_state", "noise_embeds", "context_hidden_states"):
        return rand(BATCH, TOKENS, width)
    if name == "encoder_hidden_states":
        return rand(BATCH, TOKENS, sizes.get("encoder_hidden_size", default=width))
    if name == "query_embeds":
        return rand(BATCH, sizes.get("num_query_tokens", default=4), width)
    if name == "latents":
        return rand(BATCH, width, 20)
    if name == "inputs":
        return rand(BATCH, TOKENS, sizes.get("d_model", default=width))
    if name == "input_points":
        return 8 * rand(BATCH, 1, 1, 2).abs()
    if name == "visual_feats":
        return rand(BATCH, 5, sizes.get("visual_feat_dim", default=width))
    if name == "visual_pos":
        return rand(BATCH, 5, sizes.get("visual_pos_dim", default=4))
    if name == "state":
        return rand(BATCH, sizes.get("max_state_dim", default=32))
    if name == "position_ids":
        return torch.arange(TOKENS).expand(BATCH, -1)
    if name == "lang_ids":
        return torch.zeros(BATCH, dtype=torch.long)
    if name == "bbox":
        return boxes(random)
    return None


def time_series(sizes: Sizes, accepted, random: torch.Generator) -> Inputs:
    """Past values, and what else models of time series accept about the past and the future."""
    rand: Rand = lambda *shape: torch.rand(shape, generator=random)  # noqa: E731
    past, future = sizes.get("context_length", default=32), sizes.get("prediction_length", default=8)
    timed = "past_time_features" in accepted
    if timed:
        past += max(sizes.get("lags_sequence", kinds=(list, tuple), default=(0,)))
    width = sizes.get("num_input_channels", "input_size", default=1)
    flat = "past_values_padding" in accepted or (timed and width == 1)
    shape = () if flat else (width,)
    features = sizes.get("num_time_features", default=0)
    known = {
        "past_values": rand(BATCH, past, *shape),
        "past_observed_mask": torch.ones(BATCH, past, *shape),
        "past_time_features": rand(BATCH, past, features),
        "past_values_padding": torch.zeros((BATCH, past), dtype=torch.long),
        "freq": torch.zeros((BATCH, 1), dtype=torch.long),
    }
    if timed:  # the others predict without a future, and their losses would need one of another form
        known |= {"future_values": rand(BATCH, future, *shape), "future_time_features": rand(BATCH, future, features)}
    if categories := sizes.get("num_static_categorical_features", default=0):
        known["static_categorical_features"] = torch.zeros((BATCH, categories), dtype=torch.long)
    if reals := sizes.get("num_static_real_features", default=0):
        known["static_real_features"] = rand(BATCH, reals)
    return {name: value for name, value in known.items() if name in accepted}


def decisions(sizes: Sizes, random: torch.Generator) -> Inputs:
    """A trajectory, for a decision transformer."""
    rand: Rand = lambda *shape: torch.rand(shape, generator=random)  # noqa: E731
    return {
        "states": rand(BATCH, TOKENS, sizes.get("state_dim", default=17)),
        "actions": rand(BATCH, TOKENS, sizes.get("act_dim", default=4)),
        "rewards": rand(BATCH, TOKENS, 1),
        "returns_to_go": rand(BATCH, TOKENS, 1),
        "timesteps": torch.arange(TOKENS).expand(BATCH, -1),
        "attention_mask": torch.ones((BATCH, TOKENS), dtype=torch.long),
    }

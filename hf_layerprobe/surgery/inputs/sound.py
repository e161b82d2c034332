"""Two recordings, as spectrograms or as samples, in every form in which models take them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from .sizes import Sizes

Inputs = dict[str, torch.Tensor]
SPECTROGRAMS = ("input_features", "audio_mel", "audio_input_features")
SAMPLES = ("input_values", "audio_values")
MASKS = ("input_features_mask", "feature_attention_mask", "input_values_mask", "audio_mel_mask", "audio_attention_mask")
CUTOFF = 1000  # samples of each recording that are read by models that are told: less than one frame of a codec
BANDS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "mel_bins", "num_mels", "input_feat_size",
    "input_feature_size", "input_dim", "num_bins", "input_size",
)  # fmt: skip


def sound_forms(sizes: Sizes, accepted: Collection[str], random: torch.Generator) -> Iterator[Inputs]:
    """Recordings as a model that accepts these arguments may want them, the likeliest form first."""
    spectrogram = next((name for name in SPECTROGRAMS if name in accepted), None)
    samples = next((name for name in SAMPLES if name in accepted), None)
    if spectrogram:
        named = [value for name in BANDS if (value := sizes.get(name))] or [80]
        longest = 2 * sizes.get("max_source_positions", default=32)  # two convolutions halve the frames once
        # Shapes as [frames, bands] and the other way round; the last are fixed in the models that want them.
        for frames in dict.fromkeys((longest, 64, 128, 3000)):
            shapes = [
                shape for n in dict.fromkeys(named) for shape in ((2, n, frames), (2, frames, n), (2, 1, frames, n))
            ]
            for shape in (*shapes, (2, frames, 160)):
                form = {spectrogram: torch.rand(shape, generator=random)}
                if samples:  # models that want both
                    form[samples] = torch.rand((2, 1, 320 * frames // 2), generator=random)
                yield from _masked(form, frames, accepted)
    elif samples:
        channels = sizes.get("audio_channels", default=1)
        bands, frames = sizes.get(*BANDS, default=80), sizes.get("max_length", default=64)
        width = sizes.get("hidden_size", default=64)
        for shape in (
            (2, 4000),
            (2, channels, 4000),
            (2, frames, bands),
            (2, bands, 64),
            (2, width, 40),
            (2, 64, bands),
        ):
            yield from _masked({samples: torch.rand(shape, generator=random) - 0.5}, shape[-1], accepted)


def _masked(form: Inputs, frames: int, accepted: Collection[str]) -> Iterator[Inputs]:
    known = {name: torch.ones((2, frames), dtype=torch.long) for name in MASKS}
    known["audio_feature_lengths"] = torch.full((2,), frames)
    known["audio_embed_sizes"] = torch.full((2,), frames // 8)
    known["input_values_cutoffs"] = torch.full((2, 1), CUTOFF)
    known["is_longer"] = torch.zeros((2, 1), dtype=torch.bool)
    if extra := {name: value for name, value in known.items() if name in accepted}:
        yield {**form, **extra}
        yield {**form, **{name: value.bool() if name in MASKS else value for name, value in extra.items()}}
    if "audio_embed_sizes" not in extra:  # Phi-4's is read only with its mask and its number of features
        yield form

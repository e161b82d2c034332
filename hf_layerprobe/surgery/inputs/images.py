"""Two images, or two short videos, in every form in which models take them.

Models take whole images, images in several parts, or patches with a grid that says how they were arranged. Which form is
meant is told by the names of the other arguments; what these names leave open is tried in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from .sizes import Sizes

Inputs = dict[str, torch.Tensor]
IMAGES = ("pixel_values", "image_pixel_values", "flattened_patches", "hidden_states")
VIDEOS = ("pixel_values_videos",)
GRIDS = ("image_grid_thw", "grid_thw", "video_grid_thw", "image_grid_hw", "grid_hws")
POSITIONS = ("image_position_ids", "video_position_ids", "pixel_position_ids")


def image_forms(sizes: Sizes, accepted: Collection[str], random: torch.Generator) -> Iterator[Inputs]:
    """Images as a model that accepts these arguments may want them, the likeliest form first."""
    name = next((each for each in IMAGES if each in accepted), None)
    if name == "flattened_patches":
        yield _flattened(sizes, random)
    elif name == "image_pixel_values":
        yield _cropped(sizes, random)
    elif name is not None:
        yield from _with_companions(_patches(name, sizes, accepted, random, frames=1), sizes, accepted, random)
        if name != "hidden_states":
            yield from _with_companions(_whole(name, sizes, random), sizes, accepted, random)
            width = _channels(sizes) * sizes.side("patch_size", default=16) ** 2
            for shape in ((2, 16, width), (32, width)):  # patches in rows
                yield {name: torch.rand(shape, generator=random)}


def video_forms(sizes: Sizes, accepted: Collection[str], random: torch.Generator) -> Iterator[Inputs]:
    """Videos of a few frames, likewise."""
    if "pixel_values_videos" not in accepted:
        return
    ticks = sizes.side("temporal_patch_size", default=1)
    yield from _patches("pixel_values_videos", sizes, accepted, random, frames=ticks)
    frames = sizes.get("num_frames", "frames_per_clip", default=2 * ticks)
    for size in (_image_size(sizes), sizes.get("crop_size", default=_image_size(sizes))):
        clip = torch.rand((2, frames, _channels(sizes), *_pair(size)), generator=random)
        for values in (clip, clip[:, :2]):
            found = {"pixel_values_videos": values}
            if "image_sizes_videos" in accepted:
                found["image_sizes_videos"] = torch.tensor([_pair(size)] * 2)
            yield found


def _whole(name: str, sizes: Sizes, random: torch.Generator) -> Iterator[Inputs]:
    channels = _channels(sizes)
    frames = sizes.get("num_frames", "frames_per_clip", default=2)
    named = _image_size(sizes)
    for size in dict.fromkeys((_pair(named), (64, 64), (224, 224))):
        image = torch.rand((2, channels, *size), generator=random)
        yield {name: image}
        # Each in several parts, as many as models cut one of that size into; or frames; or parts of parts.
        for parts in dict.fromkeys((1, frames, 2, 3, 5)):
            yield {name: image[:, None].repeat(1, parts, 1, 1, 1)}
        yield {name: image[:, None, None].repeat(1, 1, sizes.get("max_num_tiles", default=1), 1, 1, 1)}


def _patches(
    name: str, sizes: Sizes, accepted: Collection[str], random: torch.Generator, frames: int
) -> Iterator[Inputs]:
    """Patches in one row, or a row for each image, with what says how they were arranged."""
    video = name in VIDEOS
    channels, patch = _channels(sizes), sizes.side("patch_size", default=16)
    ticks = sizes.side("temporal_patch_size", default=1)
    merge = sizes.side("spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor", default=2)
    side, steps = 2 * merge, max(frames // ticks, 1)
    count = steps * side**2
    rand = lambda *shape: torch.rand(shape, generator=random)  # noqa: E731
    grids = [each for each in GRIDS if each in accepted and each.startswith("video") == video]
    if grids:
        grid = torch.tensor([[steps, side, side]] * 2)
        grid = grid[:, 1:] if grids[0] in ("image_grid_hw", "grid_hws") else grid
        for values in (
            rand(2 * count, channels * ticks * patch**2),
            rand(2 * count, channels * patch**2),
            rand(2 * count, channels, patch, patch),
            rand(2 * count, channels, ticks, patch, patch),
            rand(2 * count, 2 * channels * patch**2),
        ):
            form = {name: values, grids[0]: grid}
            if "video_merge_sizes" in accepted and video:
                form["video_merge_sizes"] = torch.ones(2, dtype=torch.long)
                form["video_compression_mask"] = torch.ones(2 * count, dtype=torch.bool)
            yield form
    positions = [each for each in POSITIONS if each in accepted and each.startswith("video") == video]
    if positions:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        where = torch.stack((columns, rows), dim=-1).reshape(1, side**2, 2)
        for batch in ((2, 1) if video else (2,), (2,)):
            yield {name: rand(*batch, side**2, channels * patch**2), positions[0]: where.expand(*batch, -1, -1)}
    if video:
        return
    if "spatial_shapes" in accepted:
        yield {
            name: rand(2, side**2, channels * patch**2),
            "spatial_shapes": torch.tensor([[side, side]] * 2),
            "pixel_attention_mask": torch.ones((2, side**2), dtype=torch.long),
        }
    if "target_sizes" in accepted:
        yield {name: rand(1, channels, patch, 2 * side**2 * patch), "target_sizes": torch.tensor([[side, side]] * 2)}


def _with_companions(
    forms: Iterator[Inputs], sizes: Sizes, accepted: Collection[str], random: torch.Generator
) -> Iterator[Inputs]:
    """Each form with what the other arguments about images have to say for it; also without what may be left out."""
    for form in forms:
        values = next(iter(form.values()))
        size = tuple(values.shape[-2:])
        parts = values.shape[1] if values.dim() == 5 else 1
        known = {
            "image_sizes": torch.tensor([size] * 2),
            "image_merge_sizes": torch.ones(2, dtype=torch.long),
            "merge_sizes": torch.ones(2, dtype=torch.long),
            "aspect_ratio_ids": torch.ones((2, 1), dtype=torch.long),
            "aspect_ratio_mask": torch.ones((2, 1, values.shape[2] if values.dim() == 6 else 1), dtype=torch.long),
            "pixel_values_local": values[:, None] if values.dim() == 4 else values,
            "num_local_patches": torch.ones(2, dtype=torch.long),
        }
        if values.dim() == 5:
            known["pixel_attention_mask"] = torch.ones((2, parts), dtype=torch.bool)  # which parts are there
        extra = {name: value for name, value in known.items() if name in accepted and name not in form}
        if "high_res_pixel_values" in accepted:
            finer = _pair(_high_resolution(sizes))
            extra["high_res_pixel_values"] = torch.rand((2, values.shape[1], *finer), generator=random)
        if extra:
            yield {**form, **extra}
        yield form


def _flattened(sizes: Sizes, random: torch.Generator) -> Inputs:
    """Pix2Struct's: each patch after the row and column where it stood, counted from 1."""
    patch, side = sizes.side("patch_size", default=16), 4
    where = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, -1, -1) + 1.0
    patches = torch.rand((2, side**2, _channels(sizes) * patch**2), generator=random)
    return {"flattened_patches": torch.cat((where, patches), dim=-1)}


def _cropped(sizes: Sizes, random: torch.Generator) -> Inputs:
    """Phi-4's: each image as a whole and in crops, of which there is one here, with a mask of the patches that are there."""
    size = _pair(_image_size(sizes))
    patch = sizes.side("patch_size", default=14)
    return {
        "image_pixel_values": torch.rand((2, 2, _channels(sizes), *size), generator=random),
        "image_sizes": torch.tensor([size] * 2),
        "image_attention_mask": torch.ones((2, 2, size[0] // patch, size[1] // patch), dtype=torch.long),
    }


def _image_size(sizes: Sizes):
    return sizes.get("image_size", "img_size", "input_size", kinds=(int, list, tuple), default=64)


def _high_resolution(sizes: Sizes):
    high = next((node for node in sizes.nodes if "global_attn_indexes" in vars(node)), None)
    return getattr(high, "image_size", None) or _image_size(sizes)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _channels(sizes: Sizes) -> int:
    return sizes.get("num_channels", "in_channels", "in_chans", default=3)

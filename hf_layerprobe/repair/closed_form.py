"""Training-free repair: after a cut, the layers' last matrices are fitted to bring the stream back to the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..activations.steps import Steps
from ..activations.text import Batch
from ..progress import progress
from ..scores.loss import IGNORED
from ..stacks import LayerStack
from .least_squares import Normal, best_change
from .losses import HeldOutLoss, predicts_next
from .sites import find_site

# How much of a layer's change is tried.
PARTS = (1.0, 0.5, 0.25)
# Held-out tokens that the steps are chosen on; it takes a loss for each part of each layer's change.
JUDGED = 4096


class Track:
    """One batch in both models: the original's stream, and the pruned model's at the same depth."""

    def __init__(self, original: LayerStack, batch: Batch):
        self.batch = batch
        self.steps = Steps(original, batch)
        self.target = self.stream = self.steps.start
        self.emphasis = self._emphasis(original.model)

    def weights(self, wanted: torch.Tensor) -> torch.Tensor:
        """Of each token, 1 / ‖wanted‖² times its emphasis, so that errors are relative; 0 for padding, `[batch, tokens]`."""
        weights = wanted.float().norm(dim=-1).clamp_min(1e-6) ** -2 * self.emphasis
        return weights if self.steps.mask is None else torch.where(self.steps.mask, weights, 0.0)

    def _emphasis(self, model: PreTrainedModel) -> torch.Tensor | float:
        """Half of a row's weight, spread over the tokens that predict its labels: an answer hardly counts otherwise."""
        if "labels" not in self.batch or not predicts_next(model):
            return 1.0
        labelled = pad(self.batch["labels"][:, 1:] != IGNORED, (0, 1)).to(model.device)
        tokens = labelled.shape[1] if self.steps.mask is None else self.steps.mask.sum(-1, keepdim=True)
        labels = labelled.sum(-1, keepdim=True)
        return torch.where(labels > 0, 0.5 + 0.5 * labelled * tokens / labels.clamp_min(1), 1.0)


def fit(
    original: LayerStack,
    pruned: LayerStack,
    keep: Sequence[int],
    fitted: Sequence[Batch],
    loss: HeldOutLoss,
) -> list[dict[str, Any]]:
    """Fits, in depth order, the `down` matrix of every layer from the one before the first cut on.

    Our own method, after ReplaceMe (arXiv 2505.02819) and LinearPatch (arXiv 2505.24680), which fit one map at one cut: each
    layer of the pruned model, reading what the repaired layers before it wrote, is brought towards the stream that the
    original has after the layer in its place and the removed ones behind it. Errors are relative to the token's stream, so
    that the few massive tokens neither own the squared error nor go unseen: without them, a fit is free to break what all
    others attend to. Where a causal language model's batches have labels, the tokens that predict them have half of their row's
    weight. Each channel is refitted with a ridge, only rescaled (as LinearPatch does at the cut) or left alone,
    whichever leaves the least error on the held-out batches. A layer's change is then taken whole, in part, or not at all,
    whichever gives the least loss on the first of those.

    Args:
        original: The stack of the untouched model.
        pruned: The stack of the pruned one; changed in place.
        keep: The original's layers in it.
        fitted: Batches to fit on.
        loss: What is measured, and the held-out batches to choose by: ridges by all of them, steps by the first few.

    Returns:
        One entry a layer that was changed: its index in the original, the part of the change that was taken, the share of the
        held-out error that the whole change takes away, and the loss then.

    Raises:
        LayerProbeError: Layers that cannot be run one at a time, or whose last matrix is not simply added.
    """
    parts = [[Track(original, batch) for batch in batches] for batches in (fitted, loss.batches)]
    tracks = [track for part in parts for track in part]
    judges = parts[1][: len(first(loss.batches, JUDGED))]
    wanted_outputs = [loss.wanted(track.batch) for track in judges]
    first_cut = next(i for i in range(original.num_layers) if i not in keep)
    changed, least = [], None
    for position, index in enumerate(progress(keep, desc="Closed-form repair", unit="layer")):
        last = keep[position + 1] - 1 if position + 1 < len(keep) else original.num_layers - 1
        layer = pruned.layers[position]
        for track in tracks:
            for depth in range(index, last + 1):
                track.target = track.steps.run(original.layers[depth], depth, track.target)
        if last < first_cut:
            for track in tracks:
                track.stream = track.target
            continue
        if least is None:
            least = _loss(pruned, keep, position, judges, wanted_outputs, loss)
        site = find_site(layer, lambda: tracks[0].steps.run(layer, index, tracks[0].stream))  # noqa: B023
        sums = [Normal(), Normal()]
        for part, equations in zip(parts, sums, strict=True):
            for track in part:
                read, total = site.observe(lambda: track.steps.run(layer, index, track.stream))  # noqa: B023
                wanted = site.wanted(total, track.target)
                read, residual, weights = _with_bias(read, site.matrix), wanted - total, track.weights(wanted)
                equations.update(read.flatten(0, -2), residual.flatten(0, -2), weights.flatten())
        change, share = best_change(*sums, site.written())
        before, taken = site.state(), 0.0
        for part_taken in PARTS:
            site.set(before, part_taken * change)
            value = _loss(pruned, keep, position, judges, wanted_outputs, loss)
            if value >= least and taken:  # a smaller step is no better
                break
            if value < least:
                least, taken = value, part_taken
        site.set(before, taken * change)
        if taken:
            changed.append({"layer": index, "taken": taken, "error_removed": share, "held_out_loss": least})
        for track in tracks:
            track.stream = track.steps.run(layer, index, track.stream)
    return changed


def first(rows: Sequence[Batch], max_tokens: int) -> list[Batch]:
    """The first batches, at least one, with no more tokens than that."""
    taken, tokens = [], 0
    for row in rows:
        tokens += next(iter(row.values())).shape[:2].numel()
        if taken and tokens > max_tokens:
            break
        taken.append(row)
    return taken


def _loss(
    pruned: LayerStack,
    keep: Sequence[int],
    first: int,
    tracks: Sequence[Track],
    wanted: Sequence[Any],
    loss: HeldOutLoss,
) -> float:
    """The loss on the held-out batches, from a layer of the pruned model on."""
    total, count = 0.0, 0
    for track, output in zip(tracks, wanted, strict=True):
        stream = track.stream
        for position in range(first, len(keep)):
            stream = track.steps.run(pruned.layers[position], keep[position], stream)
        value, weight = loss.sums(track.batch, track.steps.finish(stream), output)
        total, count = total + value, count + weight
    return total / max(count, 1)


def _with_bias(read: torch.Tensor, matrix: nn.Module) -> torch.Tensor:
    return read if matrix.bias is None else torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)

"""What makes a calibration pass useless, found before a batch runs or, for activations, after all have run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import LayerProbeError
from .data import longest
from .moments import token_squares
from .text import Batch

POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|\w*position_embeddings?)$")


class FiniteOutputs:
    """Finds the first batch in which each layer's output held NaN or infinite values; padding may hold anything.

    Nothing waits for the device until somebody asks.

    Args:
        num_layers: Number of layers.
    """

    def __init__(self, num_layers: int):
        self._flags: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # [layer][batch]
        self._first: torch.Tensor | None = None  # [num_layers], −1 for none; after resuming or merging

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        bad = ~torch.isfinite(token_squares(after))
        self._flags[layer].append((bad if mask is None else bad & mask).any())

    def merge(self, other: FiniteOutputs) -> None:
        """Adds what another process has found; its batches are counted by themselves."""
        mine, theirs = (each.state_dict()["first"] for each in (self, other))
        self.load_state_dict({"first": torch.where(mine >= 0, mine, theirs)})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`first`: for each layer the number of its first bad batch, −1 for none; `[num_layers]` on the CPU."""
        if self._first is not None:
            return {"first": self._first}
        flags = [torch.stack(each).cpu().numpy() if each else np.zeros(1, bool) for each in self._flags]
        return {"first": torch.tensor([int(each.argmax()) if each.any() else -1 for each in flags])}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._first = state["first"]

    def check(self, path: str) -> None:
        """Refuses what is not finite.

        Raises:
            LayerProbeError: Names the layers and the first batch.
        """
        first = self.state_dict()["first"].tolist()
        bad = [layer for layer, batch in enumerate(first) if batch >= 0]
        if bad:
            batch = min(first[layer] for layer in bad)
            origin = next(layer for layer in bad if first[layer] == batch)
            raise LayerProbeError(
                f"The outputs of layers {bad} ({path}) are not finite: they hold NaN or infinite values, first that of layer "
                f"{origin} on batch {batch} (0-based). Check that batch and the weights, or run in float32 or bfloat16."
            )


class Vocabulary:
    """Checks that token ids are those of the model.

    Args:
        model: The model that is to read them.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        try:
            table = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # what Transformers raises for models without such a table
            table = None
        reads_ids = getattr(model, "main_input_name", "input_ids") == "input_ids"
        self._size = table.num_embeddings if reads_ids and isinstance(table, nn.Embedding) else None
        # Where an image goes may be marked by an id that is in no table.
        self._marks = torch.tensor(sorted(_special_ids(getattr(model, "config", None))))

    def check(self, batch: Batch, index: int) -> None:
        """Refuses ids that the model does not know.

        Raises:
            LayerProbeError: Names the batch, the id and the size of the vocabulary.
        """
        ids = batch.get("input_ids")
        if self._size is None or ids is None or not ids.numel():
            return
        ids = ids.detach().cpu()
        unknown = ids[((ids < 0) | (ids >= self._size)) & ~torch.isin(ids, self._marks)]
        if len(unknown):
            raise LayerProbeError(
                f"Batch {index} has the token id {int(unknown[0])}, and {type(self._model).__name__} knows ids 0 to "
                f"{self._size - 1}: the tokenizer does not fit the model. Use the model's own tokenizer, or resize its "
                "embeddings with model.resize_token_embeddings(len(tokenizer))."
            )


@contextmanager
def within_positions(model: nn.Module, batch: Batch, index: int) -> Iterator[None]:
    """Within the context, a model that fails on more tokens than it has learned positions for says so.

    That it fails is left to the model: it may be told other positions, or have a table that it does not use.

    Raises:
        LayerProbeError: Names the batch, its tokens and the model's positions.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        length = batch["input_ids"].shape[-1] if "input_ids" in batch else 0
        positions = longest(model, length)
        if isinstance(error, torch.OutOfMemoryError) or positions == length or not _learned(model, positions):
            raise
        raise LayerProbeError(
            f"Batch {index} has sequences of {length} tokens, and {type(model).__name__} has {positions} positions. Cut them to "
            f"that (truncation=True, max_length={positions} of a tokenizer), or pass texts or tokenised rows, which are cut here."
        ) from error


def _learned(model: nn.Module, positions: int) -> bool:
    """Whether the model has a table with a vector for each position; some have a few rows before those."""
    tables = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return any(POSITIONS.search(name) and positions <= table.num_embeddings for name, table in tables)


def _special_ids(config: PreTrainedConfig | None) -> set[int]:
    found = set()
    for name, value in vars(config).items() if config is not None else ():
        if isinstance(value, PreTrainedConfig):
            found |= _special_ids(value)
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int:
            found.add(value)
    return found

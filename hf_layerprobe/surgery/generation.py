"""What names layers by their numbers in a generation config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

# Whisper's: pairs of decoder layer and head whose cross-attention tells when a token was said.
HEADS = "alignment_heads"


def renumbered(config: dict[str, Any], model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A generation config's entries with the layers' new numbers, without the alignment heads of removed layers.

    Args:
        config: The entries.
        model: The original.
        kept: The layers that stay (0-based, ascending), by the path of their stack.
    """
    decoder = set(model.get_decoder().modules()) if config.get(HEADS) else ()
    keep = next((each for path, each in kept.items() if model.get_submodule(path) in decoder), None)
    if keep is None:
        return config
    new = {old: number for number, old in enumerate(keep)}
    heads = [[new[layer], head] for layer, head in config[HEADS] if layer in new]
    # Whisper asks whether there is such an entry, not what it holds.
    return {name: value for name, value in config.items() if name != HEADS} | ({HEADS: heads} if heads else {})

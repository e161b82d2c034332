"""What names layers by their numbers in a generation config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

# Whisper's: pairs of decoder layer and head whose cross-attention tells when a token was said.
HEADS = "alignment_heads"


def renumber(config: dict[str, Any], model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> bool:
    """Gives the alignment heads of a generation config the layers' new numbers, in place, and drops those of removed layers.

    Args:
        config: The generation config's entries.
        model: The original.
        kept: The layers that stay (0-based, ascending), by the path of their stack.

    Returns:
        Whether anything had to change.
    """
    decoder = set(model.get_decoder().modules()) if config.get(HEADS) else ()
    keep = next((each for path, each in kept.items() if model.get_submodule(path) in decoder), None)
    if keep is None:
        return False
    new = {old: number for number, old in enumerate(keep)}
    config[HEADS] = [[new[layer], head] for layer, head in config[HEADS] if layer in new]
    if not config[HEADS]:  # Whisper asks whether there is such an entry, not what it holds
        del config[HEADS]
    return True

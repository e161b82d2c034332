"""Loads models and tokenizers by folder or Hub id, in the class that the checkpoint names."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(name_or_path: str | Path) -> PreTrainedModel:
    """The model with its head: the class under `architectures` in its config, in the dtype it was saved in.

    Args:
        name_or_path: A local folder, or a Hub id (the only case that may use the network).
    """
    config = AutoConfig.from_pretrained(name_or_path)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], AutoModel) if names else AutoModel
    return model_class.from_pretrained(name_or_path, dtype="auto")


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name_or_path)

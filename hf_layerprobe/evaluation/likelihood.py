"""How likely a causal language model finds token sequences: the one pass behind perplexity and multiple choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..activations.forward import kept_logits
from ..errors import LayerProbeError
from ..modes import evaluating
from ..progress import progress
from ..scores.loss import summed_loss

# What is read, and what is predicted at the last positions of it: the token after each.
Request = tuple[Sequence[int], Sequence[int]]


def losses(model: PreTrainedModel, requests: Sequence[Request], *, batch_size: int, desc: str) -> np.ndarray:
    """Summed token loss of each request, nats, `[requests]` float64.

    Requests that read the same tokens (the one-token labels of a classification) share a pass.
    """
    found = np.zeros(len(requests))
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, (read, _) in enumerate(requests):
        readers.setdefault(tuple(read), []).append(index)
    longest_first = sorted(readers, key=len, reverse=True)
    groups = [longest_first[i : i + batch_size] for i in range(0, len(longest_first), batch_size)]
    with evaluating(model), torch.no_grad():
        for group in progress(groups, desc=desc, unit="batch"):
            length = len(group[0])
            ids = torch.tensor([[*read, *[0] * (length - len(read))] for read in group])
            mask = torch.tensor([[1] * len(read) + [0] * (length - len(read)) for read in group])
            earliest = min(len(read) - len(requests[index][1]) for read in group for index in readers[read])
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False,
                **kept_logits(model, length - earliest),
            ).logits  # fmt: skip
            skipped = length - logits.shape[1]
            for row, read in enumerate(group):
                for index in readers[read]:
                    wanted = torch.tensor(requests[index][1], device=logits.device)
                    end = len(read) - skipped
                    kept = logits[row, end - len(wanted) : end]
                    found[index] = summed_loss(kept[None], wanted[None]).item()
    return found


def first_token(tokenizer) -> int:
    """The token that a text starts after.

    Raises:
        LayerProbeError: The tokenizer has neither BOS nor EOS.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise LayerProbeError("The tokenizer has neither a BOS nor an EOS token to start a text with.")
    return start

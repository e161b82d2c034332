"""`evaluate_model`: perplexity and bits per byte on text, of one model or of two side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations.data import check_positive, longest, text_rows
from ..errors import LayerProbeError
from ..modes import evaluating
from ..progress import progress
from ..scores.loss import IGNORED, check_causal, summed_loss


@dataclass(frozen=True)
class Evaluation:
    """How well one model predicts a text.

    Attributes:
        loss: Mean loss of a token, nats.
        perplexity: e to the power of the loss.
        bits_per_byte: Loss in bits for each UTF-8 byte of text; comparable between tokenizers.
        tokens: Tokens predicted.
        bytes: UTF-8 bytes of the text.
        parameters: Parameters of the model, tied ones once.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    parameters: int


@dataclass(frozen=True)
class Comparison:
    """An evaluation, and that of the model it came from when there is one.

    Attributes:
        after: The evaluated model.
        before: The baseline, on the same text.
    """

    after: Evaluation
    before: Evaluation | None = None

    @property
    def loss(self) -> float:
        return self.after.loss

    @property
    def perplexity(self) -> float:
        return self.after.perplexity

    @property
    def bits_per_byte(self) -> float:
        return self.after.bits_per_byte

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity after divided by before."""
        return self.after.perplexity / self.before.perplexity if self.before else None

    @property
    def retained(self) -> float | None:
        """Loss before divided by after: 1 when nothing was lost."""
        return self.before.loss / self.after.loss if self.before else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "after": asdict(self.after),
            "before": asdict(self.before) if self.before else None,
            "perplexity_ratio": self.perplexity_ratio,
            "retained": self.retained,
        }


def evaluate_model(
    model: PreTrainedModel,
    data: Sequence[str] | Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    baseline: PreTrainedModel | Evaluation | None = None,
    max_length: int = 512,
    batch_size: int = 4,
) -> Comparison:
    """Measures perplexity and bits per byte of a causal language model on text, before and after.

    Every token of every text is predicted exactly once: a text starts after the tokenizer's BOS (or EOS) token, and one
    that is longer than `max_length` goes on in a next window that starts with the last token of the one before (the
    rolling likelihood of lm-evaluation-harness).

    Args:
        model: A causal language model; left in the mode it was in.
        data: Texts, or a `datasets.Dataset` with a text column.
        tokenizer: The tokenizer of the model, and of the baseline.
        baseline: The model before pruning, or its evaluation on the same data (`Comparison.after`).
        max_length: Tokens a window; no more than the positions that the model has (by its config).
        batch_size: Windows a batch.

    Returns:
        The evaluation of the model as `.after`, of the baseline as `.before`.

    Raises:
        LayerProbeError: No text, no tokenizer, a size that is not positive, or a model that does not predict the next
            token.
    """
    if tokenizer is None:
        raise LayerProbeError("evaluate_model measures on text, so it needs tokenizer=.")
    check_positive(max_length=max_length, batch_size=batch_size)
    models = [model] if baseline is None or isinstance(baseline, Evaluation) else [model, baseline]
    max_length = min(longest(each, max_length) for each in models)
    texts = [text for text in text_rows(data) if text]
    windows = sorted((w for text in texts for w in _windows(text, tokenizer, max_length)), key=lambda w: -len(w[0]))
    if not windows:
        raise LayerProbeError("The data has no text to evaluate on: it is empty, or every text is.")
    for each in models:
        check_causal(each)
    size = sum(len(text.encode()) for text in texts)
    results = [_evaluate(each, windows, size, batch_size) for each in models]
    before = baseline if isinstance(baseline, Evaluation) else results[1] if baseline is not None else None
    return Comparison(after=results[0], before=before)


def _windows(text: str, tokenizer, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(read, predicted) token ids, of equal length."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise LayerProbeError("The tokenizer has neither a BOS nor an EOS token to start a text with.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    read = [start, *ids[:-1]]
    for begin in range(0, len(ids), max_length):
        yield read[begin : begin + max_length], ids[begin : begin + max_length]


def _evaluate(model: PreTrainedModel, windows: list, size: int, batch_size: int) -> Evaluation:
    total = torch.zeros((), dtype=torch.float64)
    groups = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    with evaluating(model), torch.no_grad():
        for group in progress(groups, desc="Perplexity", unit="batch"):
            length = len(group[0][0])
            ids = torch.tensor([read + [0] * (length - len(read)) for read, _ in group])
            labels = torch.tensor([wanted + [IGNORED] * (length - len(wanted)) for _, wanted in group])
            mask = (labels != IGNORED).long()
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
            total += summed_loss(logits, labels.to(logits.device))
    tokens = sum(len(wanted) for _, wanted in windows)
    loss = total.item() / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total.item() / math.log(2) / size,
        tokens=tokens,
        bytes=size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )

"""`measure_speed`: parameters, file size, and tokens a second of a model and the one it came from."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..activations.data import check_positive, longest
from ..errors import LayerProbeError
from ..modes import evaluating
from ..progress import progress
from .models import to_measure


@dataclass(frozen=True)
class Speed:
    """Size of one model, and its speed on the device where it lies.

    Attributes:
        parameters: Number of parameters, tied ones once.
        file_bytes: Bytes of the tensors that `save_pretrained` writes, tied ones once.
        memory_bytes: Bytes of parameters and buffers in memory.
        prefill_tokens_per_second: Reading a prompt.
        decode_tokens_per_second: Writing one token after another with the cache; None for models that do not generate.
    """

    parameters: int
    file_bytes: int
    memory_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class SpeedComparison:
    """The speed of a model, and that of the model it came from when there is one, measured in turns.

    Attributes:
        after: The model.
        before: The baseline.
    """

    after: Speed
    before: Speed | None = None

    @property
    def ratios(self) -> dict[str, float] | None:
        """After divided by before, by attribute."""
        if self.before is None:
            return None
        after, before = asdict(self.after), asdict(self.before)
        return {name: after[name] / before[name] for name in after if after[name] and before[name]}

    def to_dict(self) -> dict[str, Any]:
        return {
            "after": asdict(self.after),
            "before": asdict(self.before) if self.before else None,
            "ratios": self.ratios,
        }


def measure_speed(
    model: PreTrainedModel,
    *,
    baseline: PreTrainedModel | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
) -> SpeedComparison:
    """Measures size and speed of a text model on random tokens, before and after.

    Both models run in turns, so that what else the machine does meets both, after one run that does not count; the
    numbers are medians.

    Args:
        model: A model that reads `input_ids`; left in the mode it was in.
        baseline: The model before pruning.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens to generate after it.
        batch_size: Sequences at a time; their tokens all count.
        repeats: Runs of each model.

    Raises:
        LayerProbeError: A model that does not read tokens, a size that is not positive, or more tokens than it has
            positions.
    """
    check_positive(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats)
    models = to_measure(model, baseline)
    for each in models:
        if each.main_input_name != "input_ids":
            raise LayerProbeError(f"{type(each).__name__} reads {each.main_input_name}; speed is measured on tokens.")
        if longest(each, prompt_tokens + new_tokens) < prompt_tokens + new_tokens:
            raise LayerProbeError(
                f"{type(each).__name__} has {longest(each, prompt_tokens + new_tokens)} positions, too few for "
                f"prompt_tokens + new_tokens = {prompt_tokens + new_tokens}."
            )
    vocabulary = min(each.config.get_text_config().vocab_size for each in models)
    ids = torch.randint(0, vocabulary, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0))
    runs: list[list[tuple[float, float | None]]] = [[] for _ in models]
    with evaluating(*models), torch.no_grad():
        for _ in progress(range(repeats + 1), desc="Speed", unit="run"):
            for each, times in zip(models, runs, strict=True):
                times.append(_seconds(each, ids.to(each.device), new_tokens))
    counted = zip(models, runs, strict=True)
    return SpeedComparison(*(_speed(m, times[1:], ids.numel(), batch_size * new_tokens) for m, times in counted))


def _seconds(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[float, float | None]:
    """(prefill, decode)."""
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    _wait()
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False, **decoder)
    _wait()
    prefill = time.perf_counter() - started
    if not model.can_generate():
        return prefill, None
    clock = _Clock()
    # One more token than is counted: the first comes out of the prefill. The mixin's own generate: overrides want audio.
    GenerationMixin.generate(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, pad_token_id=0,
        min_new_tokens=new_tokens + 1, max_new_tokens=new_tokens + 1, stopping_criteria=StoppingCriteriaList([clock]),
        use_cache=True, max_time=None,
    )  # fmt: skip
    return prefill, clock.times[-1] - clock.times[0]


class _Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        _wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _speed(model: PreTrainedModel, times: list[tuple[float, float | None]], read: int, written: int) -> Speed:
    prefill, decode = zip(*times, strict=True)
    stored = {(t.data_ptr(), t.numel()): t.nbytes for t in model.state_dict().values()}
    held = {(t.data_ptr(), t.numel()): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return Speed(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=sum(stored.values()),
        memory_bytes=sum(held.values()),
        prefill_tokens_per_second=read / median(prefill),
        decode_tokens_per_second=None if None in decode else written / median(decode),
    )

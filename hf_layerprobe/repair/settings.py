"""The settings of each repair, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..activations.data import check_positive
from ..errors import LayerProbeError


@dataclass(frozen=True)
class ClosedForm:
    """Training-free repair by least squares; see [`closed_form.fit`].

    Attributes:
        max_tokens: Tokens of the data to use, three quarters to fit on and the rest to choose by.
        max_length: Tokens a sequence.
        batch_size: Sequences a batch.
    """

    max_tokens: int = 32768
    max_length: int = 512
    batch_size: int = 4

    name = "closed-form"


@dataclass(frozen=True)
class Finetune:
    """Training of the pruned model's layers, through `Trainer`, after the closed-form repair.

    Attributes:
        beside: Train only so many layers on either side of each cut; None for all. Embeddings and head are never trained.
        closed_form: Start from the closed-form repair of the same data; left out where the layers do not allow it.
        teacher: Learn from the untouched model's logits and hidden states; False learns from the batches' own labels, or
            the next tokens.
        text_weight: Weight of the text itself beside the logits: the loss of the batches' labels, or of every next token of a
            causal language model where they have none. With a teacher only, and for models that generate text.
        hidden_weight: Weight of the hidden states beside the logits (relative squared error after each layer that stands in
            for removed ones); with a teacher only.
        steps: Steps of the optimizer; one pass over the data by default.
        minutes: Stop after so long, with a checkpoint where they are kept.
        learning_rate: The highest; it falls to zero along a cosine.
        max_tokens: Tokens of the data to use; one batch in four, and at most sixteen, is held out. None for all. The default
            is some minutes of a small model on a laptop; a GPU takes millions.
        max_length: Tokens a sequence.
        batch_size: Sequences a batch.
        output_dir: Keep the Trainer's checkpoints here, in a folder for each stack, and go on from the last one that is there.
        arguments: Further `TrainingArguments`: `report_to`, `gradient_accumulation_steps`, `save_steps` and so on. bf16
            autocast is on where the hardware gains from it, unless they say `bf16=False`.
    """

    beside: int | None = None
    closed_form: bool = True
    teacher: bool = True
    text_weight: float = 0.5
    hidden_weight: float = 0.1
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 3e-4
    max_tokens: int | None = 262144
    max_length: int = 256
    batch_size: int = 4
    output_dir: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    name = "finetune"

    def __post_init__(self):
        if self.steps is not None:
            check_positive(steps=self.steps)


@dataclass(frozen=True)
class Lora(Finetune):
    """Low-rank training of every layer with PEFT, through `Trainer`; merged into the weights.

    Attributes:
        rank: Rank of the adapter.
        adapter_dir: Also keep the adapter here, as PEFT saves it: for the pruned model as it is, so without `closed_form`.
    """

    closed_form: bool = False
    learning_rate: float = 5e-4
    rank: int = 16
    adapter_dir: str | None = None

    name = "lora"

    def __post_init__(self):
        super().__post_init__()
        if self.closed_form and self.adapter_dir is not None:
            raise LayerProbeError(
                "An adapter that is kept has to fit the pruned model as it is, and closed_form=True changes that model before "
                "the adapter is trained. Leave one of closed_form and adapter_dir out."
            )


REPAIRS = {each.name: each for each in (ClosedForm, Lora, Finetune)}
Repair = ClosedForm | Finetune


def repair_config(repair: str | Repair) -> Repair:
    """The settings that a name stands for.

    Raises:
        LayerProbeError: No such repair.
    """
    if isinstance(repair, Repair):
        return repair
    if not isinstance(repair, str) or repair not in REPAIRS:
        raise LayerProbeError(f"repair={repair!r} is not known; expected one of {', '.join(map(repr, REPAIRS))}.")
    return REPAIRS[repair]()

"""How far a student's logits are from its teacher's and from the text, with the gradient made on the way.

Written with the usual functions, each step goes a dozen times through float32 tensors of tokens × vocabulary, most of them
kept for the backward pass. Here a few rows at a time are, and what is kept is the gradient in the logits' own format.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from ..scores.loss import IGNORED

# Values of the logits at a time: 16 MB in float32, which an allocator hands out again and again.
VALUES = 2**22


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    text_weight: float = 0.0,
) -> torch.Tensor:
    """Mean Kullback-Leibler divergence from the teacher's distributions, and the mean loss of the text beside it.

    Args:
        student: Logits, `[..., classes]`.
        teacher: The same of the untouched model.
        mask: Which rows count, `[...]`; all of them by default, and where it does not have one value a row.
        labels: Next token of each row that counts, `[...]`, or -100 for none.
        text_weight: Of their loss beside the divergence.

    Returns:
        A scalar in float32, differentiable once with respect to `student`.
    """
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    rows = torch.arange(len(student), device=student.device)
    if mask is not None and mask.numel() == len(student):
        rows = rows[mask.flatten().bool()]
    labels = torch.full_like(rows, IGNORED) if labels is None else labels.reshape(len(student))[rows]
    return _Distance.apply(student, teacher, rows, labels, text_weight)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, rows, labels, text_weight):
        learnt = labels != IGNORED
        # Of one row's text, in units of one row's divergence.
        weights = text_weight * len(rows) / learnt.sum().clamp_min(1) * learnt
        gradient = torch.zeros_like(student)
        total = torch.zeros((), device=student.device)
        size = max(1, VALUES // student.shape[-1])
        for part, label, weight in zip(rows.split(size), labels.split(size), weights.split(size), strict=True):
            found, wanted = (log_softmax(logits[part].float(), dim=-1) for logits in (student, teacher))
            label, weight = label.clamp_min(0).unsqueeze(-1), weight.unsqueeze(-1)
            chances = wanted.exp()
            total += (chances * wanted.sub_(found)).sum() - (weight * found.gather(-1, label)).sum()
            change = found.exp_().mul_(1 + weight).sub_(chances)
            gradient[part] = change.scatter_add_(-1, label, -weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.rows = max(len(rows), 1)
        return total / ctx.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, above):
        (gradient,) = ctx.saved_tensors
        return gradient * (above / ctx.rows), None, None, None, None

"""The distillation loss against the same formula written with PyTorch's own functions."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hf_layerprobe.repair import distillation
from hf_layerprobe.repair.distillation import distillation_loss

IGNORED = -100


def logits(*shape, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(**options)


def usual(student, teacher, mask, labels, weight):
    student, teacher, labels = student[mask].double(), teacher[mask].double(), labels[mask]
    loss = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="batchmean")
    if (labels != IGNORED).any():
        loss = loss + weight * cross_entropy(student, labels, ignore_index=IGNORED)
    return loss


@pytest.mark.parametrize("learnt", ["all", "some", "none"])
@pytest.mark.parametrize("values", [1, 100, 2**22])
def test_is_the_usual_formula_and_has_its_gradient(monkeypatch, learnt, values):
    monkeypatch.setattr(distillation, "VALUES", values)
    teacher = logits(3, 7, 11, seed=0)
    student = logits(3, 7, 11, seed=1).requires_grad_()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    labels = torch.arange(21).reshape(3, 7) % 11
    labels[0, 4:] = IGNORED
    if learnt != "all":
        labels[1 if learnt == "some" else slice(None)] = IGNORED
    found = distillation_loss(student, teacher, mask, labels, 0.5)
    (2 * found).backward()
    gradient, student.grad = student.grad, None
    expected = usual(student, teacher, mask.bool(), labels, 0.5)
    (2 * expected).backward()
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(gradient, student.grad)
    assert not gradient[0, 5:].any()


def test_a_label_without_a_row_that_counts_is_not_learnt():
    """Padding on the left: the row before the first token has that token as its next one."""
    teacher, student = logits(1, 4, 5, seed=0), logits(1, 4, 5, seed=1)
    mask, labels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[IGNORED, 2, 3, IGNORED]])
    without = torch.tensor([[IGNORED, IGNORED, 3, IGNORED]])
    assert distillation_loss(student, teacher, mask, labels, 1.0) == distillation_loss(
        student, teacher, mask, without, 1.0
    )


def test_logits_without_labels_or_a_mask_of_their_own():
    """A classifier's logits, `[batch, classes]`: its attention mask says nothing of them."""
    teacher, student = logits(6, 5, seed=0), logits(6, 5, seed=1).requires_grad_()
    found = distillation_loss(student, teacher, torch.ones(6, 9))
    everything = torch.ones(6, dtype=torch.bool)
    expected = usual(student, teacher, everything, torch.full((6,), IGNORED), 0.0)
    torch.testing.assert_close(found, expected.float())


def test_the_gradient_of_bfloat16_logits_is_theirs():
    teacher = logits(2, 40, 300, seed=0, dtype=torch.bfloat16)
    student = logits(2, 40, 300, seed=1, dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(80).reshape(2, 40)
    distillation_loss(student, teacher, None, labels, 0.5).backward()
    gradient, student.grad = student.grad, None
    assert gradient.dtype == torch.bfloat16
    usual(student, teacher, torch.ones(2, 40, dtype=torch.bool), labels, 0.5).backward()
    torch.testing.assert_close(gradient, student.grad, rtol=2e-2, atol=1e-5)


def test_labels_for_other_rows_are_refused():
    """A model that gives logits for some of its tokens only, say: the first labels would be taken for theirs."""
    with pytest.raises(RuntimeError, match="shape"):
        distillation_loss(logits(1, 2, 5, seed=0), logits(1, 2, 5, seed=1), labels=torch.zeros(1, 4, dtype=torch.long))

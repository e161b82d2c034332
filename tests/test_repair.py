"""Closed-form repair: the regression against NumPy, what it recovers exactly, and that nothing worse is ever kept."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_layerprobe import LayerProbeError, PruningPlan, plan_pruning, prune_checkpoint, prune_layers
from hf_layerprobe.repair import ClosedForm, Finetune, Lora, repair_model
from hf_layerprobe.repair.closed_form import Track
from hf_layerprobe.repair.healer import teacher_map
from hf_layerprobe.repair.least_squares import Normal, best_change
from hf_layerprobe.repair.losses import HeldOutLoss
from hf_layerprobe.repair.sites import Site
from hf_layerprobe.stacks import resolve_stack


def text_batches(number=8, rows=4, tokens=24, **extra):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 60, (rows, tokens), generator=generator), **extra} for _ in range(number)]


def inputs_for(family):
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return [{"pixel_values": torch.rand((8, 3, 16, 16), generator=generator)} for _ in range(8)]
    ids = text_batches()
    if family == "whisper":
        features = [torch.rand((4, 16, 48), generator=generator) for _ in ids]
        return [
            {"input_features": each, "decoder_input_ids": batch["input_ids"]}
            for each, batch in zip(features, ids, strict=True)
        ]
    if family in ("t5", "bart"):
        return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in ids]
    return ids


def saying(model, data):
    """The batches, labelled with what a model says itself."""
    with torch.no_grad():
        said = [model(**batch).logits[:, :-1].argmax(-1) for batch in data]
    return [
        {**batch, "labels": torch.cat([torch.full_like(each[:, :1], -100), each], dim=1)}
        for batch, each in zip(data, said, strict=True)
    ]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_regression_is_the_weighted_ridge_of_numpy():
    generator = np.random.default_rng(0)
    read, residual = generator.normal(size=(50, 7)), generator.normal(size=(50, 3))
    weight = generator.uniform(size=50) * (generator.uniform(size=50) > 0.2)
    equations = Normal()
    for part in (slice(0, 20), slice(20, 50)):  # token by token or at once is the same
        equations.update(*(torch.tensor(each[part], dtype=torch.float32) for each in (read, residual, weight)))
    gram = read.T @ (weight[:, None] * read)
    wanted = np.linalg.solve(gram + 0.3 * np.diag(gram).mean() * np.eye(7), read.T @ (weight[:, None] * residual))
    found = equations.solve(0.3)
    assert np.allclose(found, wanted, atol=1e-5)
    error = (weight[:, None] * (residual - read @ wanted) ** 2).sum(0)
    assert equations.error_of(found).tolist() == pytest.approx(error.tolist(), rel=1e-4)


def test_what_does_not_hold_elsewhere_is_not_fitted():
    read, residual, weight = torch.randn(40, 5), torch.randn(40, 2), torch.ones(40)
    fit, same_again, opposite = Normal(), Normal(), Normal()
    fit.update(read, residual, weight)
    same_again.update(read, residual, weight)
    opposite.update(read, -residual, weight)
    written = torch.zeros(5, 2)
    change, share = best_change(fit, same_again, written)
    assert change.abs().min() > 0 and share > 0
    change, share = best_change(fit, opposite, written)
    assert change.abs().max() == 0 and share == 0


def test_each_channel_has_its_own_ridge():
    """A channel that the reading explains is fitted, and one a thousand times as large that is noise is left alone."""
    generator = torch.Generator().manual_seed(0)
    equations = [Normal(), Normal()]
    for each in equations:
        read = torch.randn((60, 20), generator=generator)
        residual = torch.stack([read[:, 0], 1000 * torch.randn(60, generator=generator)], dim=1)
        each.update(read, residual, torch.ones(60))
    change, _ = best_change(*equations, torch.zeros(20, 2))
    assert change[0, 0] > 0.9 and equations[1].error_of(change)[1] <= equations[1].error[1]


def test_a_channel_can_just_be_rescaled():
    """One number a channel, against NumPy; where there are fewer tokens than weights, it is what holds elsewhere."""
    generator = np.random.default_rng(0)
    written, scales = generator.normal(size=(30, 3)), np.array([0.5, -0.2, 2.0])
    equations = [Normal(), Normal()]
    for each, number in zip(equations, (12, 200), strict=True):
        read = generator.normal(size=(number, 30))
        residual = read @ written * scales + generator.normal(size=(number, 3))
        each.update(*(torch.tensor(value, dtype=torch.float32) for value in (read, residual, np.ones(number))))
        if number == 12:
            found = equations[0].rescaling(torch.tensor(written, dtype=torch.float32))
            wanted = [np.linalg.lstsq((read @ written)[:, [j]], residual[:, j])[0][0] for j in range(3)]
            assert np.allclose(found, written * wanted, atol=1e-4)
    change, _ = best_change(*equations, torch.tensor(written, dtype=torch.float32))
    assert torch.equal(change, found)


def test_a_layer_that_writes_a_constant_is_replaced_exactly():
    """Its constant fits into the bias of the matrix before it."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for matrix in (model.transformer.h[1].attn.c_proj, model.transformer.h[1].mlp.c_proj):
            matrix.weight.zero_()
            matrix.bias.normal_(generator=torch.Generator().manual_seed(1))
    pruned = prune_layers(model, remove=[1])
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        wanted, before = model(ids).logits, pruned(ids).logits
        found = repair_model(pruned, model, [0, 2, 3], saying(model, text_batches(12)))
        after = pruned(ids).logits
    assert found["kept"] and found["layers"][0]["layer"] == 0 and found["layers"][0]["error_removed"] > 0.99
    assert (after - wanted).norm() < 0.1 * (before - wanted).norm()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bert", "t5", "bart", "vit", "whisper"])
def test_families_come_closer_to_the_original(family):
    model, data = tiny_model(family), inputs_for(family)
    causal = family in ("gpt2", "gpt_neox", "opt")
    data = saying(model, data) if causal else data  # next tokens of random text say nothing
    pruned = prune_layers(model, remove=[1])
    pruned.train()
    untouched, plain = weights(model), weights(pruned)
    keep = [i for i in range(resolve_stack(model).num_layers) if i != 1]
    found = repair_model(pruned, model, keep, data)
    losses = found["held_out_loss"]
    assert found["kept"] and losses["repaired"] < losses["pruned"]
    assert found["loss"] == ("labels" if causal else "distance to the original")
    assert same(untouched, weights(model)) and pruned.training and not model.training
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed and all(".1." in n or ".0." in n or ".2." in n or ".3." in n for n in changed)


def test_a_repair_that_makes_things_worse_is_undone():
    """The labels are what the pruned model says itself, and is sure of, so whatever changes it makes its loss worse."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    pruned = prune_layers(model, remove=[1])
    data = saying(pruned, text_batches())
    plain = weights(pruned)
    found = repair_model(pruned, model, [0, 2, 3], data)
    assert not found["kept"] and found["loss"] == "labels" and not found["layers"]
    assert found["held_out_loss"]["repaired"] == found["held_out_loss"]["pruned"]
    assert same(plain, weights(pruned))


def test_padding_never_counts():
    """What the padded positions hold changes nothing."""
    model = tiny_model("bert")
    mask = (torch.arange(24)[None] < torch.tensor([24, 10, 17, 5])[:, None]).long()
    repaired = []
    for filler in (0, 7):
        data = text_batches(attention_mask=mask)
        for batch in data:
            batch["input_ids"] = torch.where(mask.bool(), batch["input_ids"], filler)
        pruned = prune_layers(model, remove=[1])
        repair_model(pruned, model, [0, 2, 3], data)
        repaired.append(weights(pruned))
    for name, tensor in repaired[0].items():
        assert torch.allclose(tensor, repaired[1][name], atol=1e-4), name


def test_prune_and_repair_in_one_call(tmp_path):
    model = tiny_model("gpt2")
    plan = plan_pruning(model, remove=[1])
    data = saying(model, text_batches())
    pruned = prune_layers(model, plan, data=data, repair="closed-form", output_dir=tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(weights(pruned), weights(reloaded))
    assert not same(weights(pruned), weights(prune_layers(model, plan)))
    stored = PruningPlan.load(tmp_path / "model")
    assert stored.remove == plan.remove and stored.repair["kept"] and stored.repair["method"] == "closed-form"
    # Carried out again without a repair, it is the record of none.
    prune_layers(model, tmp_path / "model", output_dir=tmp_path / "again", verify=False)
    model.save_pretrained(tmp_path / "in")
    prune_checkpoint(tmp_path / "in", stored, output_dir=tmp_path / "files", verify=False)
    assert not any(PruningPlan.load(tmp_path / name).repair for name in ("again", "files"))
    assert json.loads((tmp_path / "model" / "pruning_plan.json").read_text())["repair"]["settings"]["max_length"] == 512
    card = (tmp_path / "model" / "README.md").read_text()
    assert "`transformer.h` was repaired (`closed-form`)" in card and "Nothing was trained" not in card


def test_repair_from_texts():
    texts = [f"text {i}: the quick brown fox jumps over the lazy dog" for i in range(40)]
    settings = ClosedForm(max_length=24, batch_size=2, max_tokens=1000)
    model = tiny_model("gpt_neox")
    repaired, plain = (
        prune_layers(model, remove=[1], data=texts, tokenizer=tiny_tokenizer(), repair=each)
        for each in (settings, None)
    )
    assert not same(weights(repaired), weights(plain))


def healing(**changes):
    return {"steps": 6, "learning_rate": 5e-3, "max_length": 24, **changes}


@pytest.mark.parametrize("settings", [Lora(**healing(rank=4)), Finetune(**healing()), Lora(**healing(teacher=False))])
def test_training_brings_it_closer_and_leaves_a_plain_model(settings, tmp_path):
    model = tiny_model("llama")
    data = saying(model, text_batches(12))
    pruned = prune_layers(model, remove=[1])
    names, untouched, plain = list(pruned.state_dict()), weights(model), weights(pruned)
    found = repair_model(pruned, model, [0, 2, 3], data, repair=settings)
    losses = found["held_out_loss"]
    assert found["kept"] and losses["repaired"] < losses["pruned"]
    assert found["teacher_map"] == {"0": 1, "1": 2, "2": 3}
    assert list(pruned.state_dict()) == names and all(p.requires_grad for p in pruned.parameters())
    assert same(untouched, weights(model)) and not same(plain, weights(pruned)) and not pruned.training
    pruned.save_pretrained(tmp_path)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(pruned))


def test_training_beside_the_cut_leaves_the_rest_alone():
    model = tiny_model("bart")
    pruned = prune_layers(model, remove=[1], stack="model.decoder.layers")
    plain = weights(pruned)
    repair_model(
        pruned,
        model,
        [0, 2, 3, 4],
        inputs_for("bart"),
        repair=Finetune(**healing(beside=1, closed_form=False)),
        stack="model.decoder.layers",
    )
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed and all(name.startswith(("model.decoder.layers.0.", "model.decoder.layers.1.")) for name in changed)


@pytest.mark.parametrize("kind, closed_form", [(Lora, False), (Finetune, False), (Finetune, True)])
def test_training_that_diverges_is_undone(kind, closed_form):
    """What is left is the model that it started from: as it was pruned, or as the closed-form repair made it."""
    model = tiny_model("llama")
    data = saying(model, text_batches())
    pruned, start = (prune_layers(model, remove=[1]) for _ in range(2))
    settings = kind(steps=3, learning_rate=1e4, closed_form=closed_form, arguments={"max_grad_norm": 0.0})
    found = repair_model(pruned, model, [0, 2, 3], data, repair=settings)
    if closed_form:
        repair_model(start, model, [0, 2, 3], data)
    assert not found["trained"] and found["kept"] == closed_form
    assert same(weights(start), weights(pruned)) and all(p.requires_grad for p in pruned.parameters())
    assert found["held_out_loss"]["repaired"] == found["held_out_loss"]["closed-form" if closed_form else "pruned"]


def test_the_text_is_learnt_beside_the_teacher():
    """With a teacher that knows nothing of the text, its loss falls the more the text weighs."""
    model = tiny_model("llama")
    data = text_batches(12, rows=2, tokens=8)
    for batch in data:
        batch["input_ids"][:] = torch.arange(3, 11)
    losses = []
    for weight in (0.0, 10.0):
        pruned = prune_layers(model, remove=[1])
        found = repair_model(pruned, model, [0, 2, 3], data, repair=Finetune(**healing(text_weight=weight)))
        losses.append(found["held_out_loss"]["repaired"])
    assert losses[1] < 0.5 * losses[0]


def test_training_starts_as_pruned_where_the_closed_form_cannot_be_had():
    model = tiny_model("mixtral")
    pruned = prune_layers(model, remove=[1])
    found = repair_model(pruned, model, [0, 2, 3], saying(model, text_batches()), repair=Finetune(**healing()))
    assert found["kept"] and found["trained"] and "layers" not in found
    assert found["held_out_loss"]["closed-form"] == found["held_out_loss"]["pruned"]


def test_an_adapter_fits_the_pruned_model_as_it_is(tmp_path):
    with pytest.raises(LayerProbeError, match="Leave one of closed_form and adapter_dir out"):
        Lora(closed_form=True, adapter_dir=str(tmp_path))


def test_training_stops_in_time_and_resumes(tmp_path):
    model = tiny_model("llama")
    data, saved = saying(model, text_batches(12)), tmp_path / "checkpoints"
    pruned = prune_layers(model, remove=[1])
    plain = weights(pruned)
    for settings in (Lora(minutes=1e-9), Finetune(minutes=1e-9)):  # the closed form before it is undone too
        with pytest.raises(LayerProbeError, match="minutes=1e-09 is too short for one training step"):
            repair_model(pruned, model, [0, 2, 3], data, repair=settings)
    assert same(plain, weights(pruned)) and list(plain) == list(pruned.state_dict())
    settings = healing(output_dir=str(saved), arguments={"save_steps": 3, "seed": 3})
    found = repair_model(pruned, model, [0, 2, 3], data, repair=Finetune(**settings))
    assert str(tmp_path) not in json.dumps(found)  # it goes into the plan, which may be pushed
    assert (saved / "model.layers" / "checkpoint-3").is_dir()
    shutil.rmtree(saved / "model.layers" / "checkpoint-6")
    again = prune_layers(model, remove=[1])
    repair_model(again, model, [0, 2, 3], data, repair=Finetune(**settings))
    for name, tensor in weights(pruned).items():
        assert torch.allclose(tensor, again.state_dict()[name], atol=1e-6), name


def test_an_adapter_can_be_kept(tmp_path):
    model = tiny_model("llama")
    data = saying(model, text_batches(12))
    pruned, plain = (prune_layers(model, remove=[1]) for _ in range(2))
    repair_model(pruned, model, [0, 2, 3], data, repair=Lora(**healing(adapter_dir=str(tmp_path))))
    merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    for name, tensor in weights(pruned).items():
        assert torch.allclose(tensor, merged.state_dict()[name], atol=1e-5), name


def test_what_holds_the_place_of_removed_layers():
    assert teacher_map([0, 3, 4], 6) == {0: 2, 1: 3, 2: 5}


def test_a_data_set_without_text():
    model = tiny_model("llama")
    rows = Dataset.from_dict({"number": [1, 2, 3]})
    with pytest.raises(LayerProbeError, match="number"):
        prune_layers(model, remove=[1], data=rows, tokenizer=tiny_tokenizer(), repair="lora")


@pytest.mark.parametrize(
    "family, data, repair, message",
    [
        (
            "llama",
            text_batches(),
            "magic",
            "repair='magic' is not known; expected one of 'closed-form', 'lora', 'finetune'",
        ),
        ("llama", None, "closed-form", "pass data="),
        ("llama", iter(text_batches()), "closed-form", "which can be read once"),
        ("llama", text_batches(1), "closed-form", "makes 1 batch"),
        ("mixtral", text_batches(), "closed-form", "0 plain down matrices (a mixture of experts has none)"),
        ("gemma3", text_batches(), "closed-form", "does not add the output of its down matrix to the stream as it is"),
    ],
)
def test_what_cannot_be_repaired(family, data, repair, message):
    model = tiny_model(family)
    with pytest.raises(LayerProbeError) as error:
        prune_layers(model, remove=[1], data=data, repair=repair)
    assert message in str(error.value)


def test_a_change_is_seen_under_autocast():
    """Autocast keeps copies of the weights; with stale ones no step would change the loss, and none be taken."""
    matrix = torch.nn.Linear(3, 2)
    site, read = Site(matrix, matrix), torch.ones(1, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = matrix(read)
        site.set(site.state(), torch.ones(4, 2))
        assert (matrix(read) - before - 4).abs().max() < 0.1


@pytest.mark.parametrize("settings", [Lora(**healing(rank=4)), Finetune(**healing(closed_form=False))])
def test_training_is_the_same_under_a_callers_autocast(settings):
    """With its copies of the weights every step would be taken from the start, and the loss be that from before."""
    model = tiny_model("llama")
    data = saying(model, text_batches(12))
    pruned = [prune_layers(model, remove=[1]) for _ in range(2)]
    torch.manual_seed(0)
    repair_model(pruned[0], model, [0, 2, 3], data, repair=settings)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        model(**data[0]), pruned[1](**data[0])
        found = repair_model(pruned[1], model, [0, 2, 3], data, repair=settings)["held_out_loss"]
        assert HeldOutLoss(model, data).of(pruned[1]) < HeldOutLoss(model, data).of(prune_layers(model, remove=[1]))
    assert found["repaired"] < found["pruned"]
    assert same(*map(weights, pruned))


def test_errors_are_relative_to_the_token():
    """A token a thousand times as long as the others counts like them, and padding not at all."""
    batch = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.tensor([[1] * 6 + [0] * 2])}
    track = Track(resolve_stack(tiny_model("llama")), batch)
    wanted = torch.randn((1, 8, 5), generator=torch.Generator().manual_seed(0))
    wanted[0, 0] *= 1000
    found = track.weights(wanted) * wanted.square().sum(-1)
    assert torch.allclose(found, batch["attention_mask"].float())


def test_half_of_a_row_is_its_answer():
    """Of 6 tokens the one before the answer has half the weight and its part of the other; a row without labels is even."""
    labels = torch.full((3, 8), -100)
    labels[0, 5], labels[2] = 7, 7
    batch = {
        "input_ids": torch.full((3, 8), 3),
        "labels": labels,
        "attention_mask": torch.ones((3, 8), dtype=torch.int64),
    }
    batch["attention_mask"][0, 6:] = 0
    found = Track(resolve_stack(tiny_model("llama")), batch).weights(torch.ones(3, 8, 1))
    assert found[0].tolist() == [0.5, 0.5, 0.5, 0.5, 3.5, 0.5, 0, 0]
    assert found[1].tolist() == [1] * 8
    assert torch.allclose(found.sum(-1), torch.tensor([6.0, 8, 8]))

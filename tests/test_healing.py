"""What training a pruned model leaves behind besides its weights, what it goes on from, and models that are no plain decoders."""

import random

import numpy as np
import pytest
import torch
import transformers as tf
from test_repair import healing, same, saying, text_batches, weights
from tiny import redrawn, tiny_model, tiny_tokenizer

from hf_layerprobe import LayerProbeError, prune_layers
from hf_layerprobe.repair import Finetune, Lora, repair_model
from hf_layerprobe.repair.healer import Healer
from hf_layerprobe.repair.run import _spread

BOTH = pytest.mark.parametrize("kind", [Finetune, Lora])


def trained(kind, data=None, model=None, **settings):
    model = model or tiny_model("llama")
    data = saying(model, text_batches(12)) if data is None else data
    pruned = prune_layers(model, remove=[1])
    return pruned, repair_model(pruned, model, [0, 2, 3], data, repair=kind(**healing(**settings)))


@BOTH
def test_only_weights_change(kind, tmp_path):
    model = tiny_model("llama")
    start = prune_layers(model, remove=[1])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    arguments = {"bf16": True, "gradient_checkpointing": True}
    pruned, found = trained(kind, model=model, closed_form=False, arguments=arguments)
    assert found["trained"] and (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert vars(pruned).keys() == vars(start).keys()  # no autocast around it
    assert pruned.config.to_dict() == start.config.to_dict()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in pruned.modules())
    assert not pruned._forward_hooks and not pruned.get_input_embeddings()._forward_hooks
    pruned.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(pruned(ids).logits, type(pruned).from_pretrained(tmp_path)(ids).logits)


@BOTH
def test_what_accelerate_shares_is_as_it_was(kind):
    """A caller's own accelerator goes on accumulating, in its own precision."""
    from accelerate import Accelerator

    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with torch.no_grad():  # a caller who wants no gradients has them in the training only
        _, found = trained(kind, closed_form=False, arguments={"bf16": True})
    assert found["trained"]
    assert own.gradient_accumulation_steps == 4 and own.mixed_precision == "no"
    assert Accelerator(mixed_precision="no").mixed_precision == "no"
    with torch.inference_mode(), pytest.raises(LayerProbeError, match="inference_mode.* rules out"):
        trained(kind)


@BOTH
def test_what_has_nothing_to_predict(kind):
    """One such row among the held-out ones counts nothing; if none has anything, no repair is begun."""
    model = tiny_model("llama")
    alone = [{"input_ids": ids[:, :1], "labels": ids[:, :1]} for ids in (b["input_ids"][:1] for b in text_batches(1))]
    data = [{**batch, "labels": batch["input_ids"]} for batch in text_batches(12)]
    data[1] = alone[0]  # held out
    _, found = trained(kind, data, model, closed_form=False)
    assert found["loss"] == "labels" and found["trained"]
    silent = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in text_batches(12)]
    with pytest.raises(LayerProbeError, match="Nothing that is held out counts for the loss .labels."):
        trained(kind, silent, model)


def test_a_loss_that_is_nan(monkeypatch):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(LayerProbeError, match="of the original and of the pruned model is NaN"):
        repair_model(prune_layers(model, remove=[1], verify=False), model, [0, 2, 3], text_batches())


def test_steps_are_counted_from_one():
    with pytest.raises(LayerProbeError, match="steps must be a positive whole number, got 0"):
        Finetune(steps=0)


def test_a_half_precision_adapter_is_judged_merged():
    model = tiny_model("llama").bfloat16()
    data = text_batches(12)
    pruned, found = trained(Lora, data, model, learning_rate=1e-4)
    held_out = [data[number] for number in sorted(_spread(len(data)))]
    from hf_layerprobe.repair.losses import HeldOutLoss

    assert HeldOutLoss(model, held_out).of(pruned) == found["held_out_loss"]["repaired"]


def test_a_place_where_no_adapter_can_be_kept(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    model = tiny_model("llama")
    pruned = prune_layers(model, remove=[1])
    plain = weights(pruned)
    with pytest.raises(LayerProbeError, match="exists and is no folder"):
        repair_model(pruned, model, [0, 2, 3], text_batches(), repair=Lora(**healing(adapter_dir=str(place))))
    assert same(weights(pruned), plain)


@pytest.mark.parametrize("other", ["model", "data", "layers", "kind"])
def test_checkpoints_of_another_repair(other, tmp_path):
    model, data = tiny_model("llama"), text_batches()
    settings = healing(output_dir=str(tmp_path))
    repair_model(prune_layers(model, remove=[1]), model, [0, 2, 3], data, repair=Finetune(**settings))
    removed, kind = [1], Finetune
    if other == "model":
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
    elif other == "data":
        data = text_batches(9)
    elif other == "layers":
        removed = [2]
    else:
        kind = Lora
    pruned = prune_layers(model, remove=removed)
    plain = weights(pruned)
    with pytest.raises(LayerProbeError, match="model.layers holds the checkpoints of another repair .* Name another"):
        keep = [index for index in range(4) if index not in removed]
        repair_model(pruned, model, keep, data, repair=kind(**settings))
    assert same(weights(pruned), plain)


@BOTH
def test_each_stack_has_its_checkpoints(kind, tmp_path):
    model, steps = tiny_model("t5"), []
    settings = kind(**healing(output_dir=str(tmp_path), closed_form=False))
    ids = text_batches()
    data = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in ids]
    plain = Healer.compute_loss
    try:
        Healer.compute_loss = lambda self, *args, **kwargs: (steps.append(1), plain(self, *args, **kwargs))[1]
        prune_layers(
            model, remove={"encoder.block": [1], "decoder.block": [2]}, data=data, repair=settings, verify=False
        )
    finally:
        Healer.compute_loss = plain
    assert len(steps) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.block", "decoder.block"}


def test_a_budget_leaves_a_checkpoint(tmp_path, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("hf_layerprobe.repair.healer.time.monotonic", lambda: next(ticks))
    trained(Finetune, steps=30, minutes=3 / 60, output_dir=str(tmp_path))
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-4"]


def test_one_pass_is_one_pass(monkeypatch):
    seen = []
    plain = Healer.compute_loss
    monkeypatch.setattr(
        Healer,
        "compute_loss",
        lambda self, model, inputs, **options: (seen.append(inputs["input_ids"]), plain(self, model, inputs))[1],
    )
    trained(Finetune, text_batches(12), steps=None, arguments={"gradient_accumulation_steps": 4})
    assert len(seen) == 12 - len(_spread(12)) == len({tuple(ids.flatten().tolist()) for ids in seen})
    trained(Finetune, text_batches(12), steps=1, minutes=1e-9)  # its one step is done


@pytest.mark.parametrize("number", [2, 63, 79, 127, 1000])
def test_at_most_sixteen_batches_are_held_out(number):
    assert 1 <= len(_spread(number)) <= 16


@pytest.mark.parametrize("family", ["t5", "bart"])
@BOTH
def test_a_decoder_reads_the_labels(kind, family):
    """The teacher's too: batches of sequence-to-sequence training have labels and nothing else for it."""
    model, read = tiny_model(family), []
    data = [
        {
            **batch,
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "labels": batch["input_ids"].flip(1)[:, :9].contiguous(),
        }
        for batch in text_batches()
    ]
    for batch in data:
        batch["labels"][0, 5:] = -100
    path = "encoder.block" if family == "t5" else "model.encoder.layers"
    pruned = prune_layers(model, remove=[1], stack=path)
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _m, args, kwargs: read.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    found = repair_model(pruned, model, [0, 2, 3], data, repair=kind(**healing(closed_form=False)), stack=path)
    expected = [model.prepare_decoder_input_ids_from_labels(batch["labels"]) for batch in data]
    assert found["trained"] and read
    assert all(any(torch.equal(ids, each) for each in expected) for ids in read)


def test_a_decoder_learns_the_labels_beside_the_teacher():
    """By which it is judged."""
    model = tiny_model("t5")
    data = [{**batch, "labels": torch.full_like(batch["input_ids"][:, :6], 7)} for batch in text_batches(12)]
    found = []
    for weight in (0.0, 5.0):
        pruned = prune_layers(model, remove=[1], stack="decoder.block")
        settings = Finetune(**healing(closed_form=False, text_weight=weight, steps=12))
        report = repair_model(pruned, model, [0, 2, 3, 4], data, repair=settings, stack="decoder.block")
        found.append(report["held_out_loss"]["trained"])
    assert report["loss"] == "labels" and found[1] < 0.9 * found[0]


M2M = dict(
    d_model=32, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
    decoder_attention_heads=4, vocab_size=64, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("repair", ["closed-form", Finetune(**healing()), Lora(**healing())])
def test_decoders_that_shift_labels_inside_of_forward(repair):
    """M2M100 has no function that shifts, and Whisper none either; what they read is their labels, shifted."""
    texts = [f"text {i}: the quick brown fox" for i in range(12)]
    options = dict(tokenizer=tiny_tokenizer(), repair=repair)
    m2m = redrawn(tf.M2M100ForConditionalGeneration(tf.M2M100Config(**M2M)))
    prune_layers(m2m, remove=[1], data=texts, **options)
    whisper = tiny_model("whisper")
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_features": torch.randn(2, 16, 48, generator=draw),
            "labels": torch.randint(3, 60, (2, 9), generator=draw),
        }
        for _ in range(8)
    ]
    read = []
    whisper.model.decoder.register_forward_pre_hook(
        lambda _m, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    prune_layers(whisper, remove=[1], data=batches, repair=repair)
    assert any(ids.shape == (2, 9) for ids in read)
    for ids in read:
        if ids.shape == (2, 9):
            assert any(torch.equal(ids[:, 1:], b["labels"][:, :-1]) for b in batches) and (ids[:, 0] == 1).all()


@BOTH
def test_a_model_of_one_value(kind):
    """Its softmax says nothing."""
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    model = redrawn(tf.LlamaForSequenceClassification(config))
    _, found = trained(kind, text_batches(12), model, closed_form=False, steps=12, learning_rate=1e-3)
    assert found["loss"] == "distance to the original" and found["trained"]
    assert 0 < found["held_out_loss"]["repaired"] < found["held_out_loss"]["pruned"]


def test_without_a_teacher_there_must_be_labels():
    model = tiny_model("bert")
    with pytest.raises(LayerProbeError, match="BertForMaskedLM does not predict next tokens, so without a teacher"):
        trained(Finetune, text_batches(), model, teacher=False)


def test_float16_where_bfloat16_is_the_default(monkeypatch):
    monkeypatch.setattr("hf_layerprobe.repair.training.gains_from_bfloat16", lambda device: True)
    asked = []
    monkeypatch.setattr("hf_layerprobe.repair.training.TrainingArguments", lambda **given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(Finetune, arguments={"fp16": True})
    assert asked[0]["fp16"] and not asked[0]["bf16"]


def test_texts_padded_on_the_left():
    """A padding position predicts nothing."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    from hf_layerprobe import score_layers
    from hf_layerprobe.repair.losses import HeldOutLoss
    from hf_layerprobe.scores.loss import next_token_loss

    found = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = dict(tokenizer(["a short one", "and a longer one than that"], padding=True, return_tensors="pt"))
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        found.append(
            [HeldOutLoss(model, [batch]).of(model), *score_layers(model, [batch], by="bypass").values]
            + [next_token_loss(model, [{**batch, "position_ids": None}])] * (side == "right")
        )
    assert found[0] == pytest.approx(found[1][:5], rel=1e-5)
    assert found[1][0] == pytest.approx(found[1][5], rel=1e-5)

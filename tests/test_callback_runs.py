"""The callback in every kind of run: what it measures is right, and the run does not notice."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import redrawn, tiny_model, tiny_tokenizer
from torch._dynamo.utils import counters
from training import AVSS, CHECKPOINTING, LAYERS, entries, expected, logged, model_hooks, rows, steps
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_layerprobe import LayerProbeCallback, LayerProbeHistory, PruneOnTrainEndCallback, docs, score_layers
from hf_layerprobe.scores import matching

EVALS = dict(eval_strategy="steps", eval_steps=2)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, vocab_size=64, decoder_start_token_id=0)
TRAINING = [name.replace("avss/", "avss/training/") for name in AVSS]


class Keeps(TrainerCallback):
    """The batches of a step, taken by a hook of its own."""

    def __init__(self, model, step):
        self.step, self.now, self.batches = step, 0, []
        self.handle = model.register_forward_pre_hook(self.take, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1

    def take(self, model, args, kwargs):
        if self.now == self.step and model.training:
            self.batches.append({k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({}, 1),
        (dict(gradient_accumulation_steps=2), 2),
        ({CHECKPOINTING: True}, 1),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, 1),
    ],
    ids=["plain", "accumulated", "checkpointed", "checkpointed with reentry"],
)
def test_training_batches_each_token_once(make_trainer, arguments, batches):
    model = tiny_model("llama")
    model.config.use_cache = False
    keeps = Keeps(model, step=2)
    trainer = make_trainer(LayerProbeCallback("avss", every=[2], batches="training"), keeps, model=model, **arguments)
    trainer.train()
    keeps.handle.remove()
    (entry,) = entries(trainer)
    assert entry["step"] == 2 and len(keeps.batches) == batches
    values = score_layers(trainer.model, keeps.batches, by="avss").values  # the learning rate is 0
    assert [entry[name] for name in TRAINING] == pytest.approx(values.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("every", "arguments", "at"),
    [
        ("eval", dict(eval_strategy="steps", eval_steps=3, max_steps=8), [3, 6, 8]),
        ("epoch", dict(max_steps=10), [4, 8, 10]),
        (3, dict(max_steps=8), [3, 6]),
        ([1, 4], dict(max_steps=8), [1, 4]),
    ],
)
def test_which_training_steps_are_measured(make_trainer, every, arguments, at):
    trainer = make_trainer(LayerProbeCallback(("avss", "docs"), every=every, batches="training"), **arguments)
    trainer.train()
    assert steps(trainer, "layerprobe/avss/training/") == at


def dropping(size=32):
    """Dropout draws random numbers in every training pass: one drawn by the callback would show."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
        attention_dropout=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("arguments", [{}, dict(bf16=True), dict(gradient_accumulation_steps=2)], ids=str)
@pytest.mark.parametrize("batches", ["evaluation", "training"])
def test_training_is_bit_identical(make_trainer, arguments, batches):
    def run(*callbacks):
        arguments_ = dict(learning_rate=0.01, max_steps=4, logging_steps=1, **EVALS) | arguments
        trainer = make_trainer(*callbacks, model=dropping(160), **arguments_)
        trainer.train()
        keys = ("loss", "eval_loss", "grad_norm")
        return trainer, [e[k] for e in trainer.state.log_history for k in keys if k in e], trainer.model.state_dict()

    _, losses, weights = run()
    matching._bfloat16_is_faster.cache_clear()  # the first DOCS of a process tries the device out
    callback = LayerProbeCallback(("avss", "influence", "docs", "drift"), maps=True, batches=batches)
    trainer, losses_with, weights_with = run(callback)
    assert len([e for e in entries(trainer) if logged(e, "layerprobe/avss/")]) == 2 and len(losses) == 4 + 4 + 2
    assert losses == losses_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)


def test_mixed_precision_measures_what_the_model_computes(make_trainer):
    exact, mixed = (make_trainer(LayerProbeCallback("avss"), bf16=bf16, **EVALS) for bf16 in (False, True))
    for trainer in (exact, mixed):
        trainer.train()
    pair = [logged(entries(trainer)[0]) for trainer in (exact, mixed)]
    assert pair[0] == pytest.approx(pair[1], rel=0.15) and pair[0] != pytest.approx(pair[1], rel=1e-6)


def test_checkpoints_hold_nothing_but_json_of_it(make_trainer, tmp_path):
    saving = dict(save_strategy="steps", save_steps=4)

    def files(*callbacks):
        make_trainer(*callbacks, **saving).train()
        folder = tmp_path / "out" / "checkpoint-4"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    without, with_it = files(), files(LayerProbeCallback(("docs", "drift"), every=2))
    assert without.keys() == with_it.keys()
    assert not [name for name, content in with_it.items() if b"layerprobe" in content and not name.endswith(".json")]
    state = json.loads(with_it["trainer_state.json"])
    assert state["stateful_callbacks"]["LayerProbeCallback"]["args"]["scores"] == ["docs", "drift"]


@pytest.mark.parametrize("batches", ["evaluation", "training"])
def test_compiled_graphs_are_the_same(make_trainer, batches):
    def run(*callbacks):
        torch._dynamo.reset()
        counters.clear()
        trainer = make_trainer(*callbacks, torch_compile=True, torch_compile_backend="eager", max_steps=3, **EVALS)
        trainer.train()
        return trainer, dict(counters["stats"]), sum(counters["graph_break"].values())

    _, stats, breaks = run()
    trainer, stats_with, breaks_with = run(LayerProbeCallback("avss", every=[2], batches=batches))
    assert stats["unique_graphs"] >= 1
    assert (stats_with["unique_graphs"], breaks_with) == (stats["unique_graphs"], breaks)
    (entry,) = entries(trainer, "layerprobe/avss/")
    assert len(logged(entry)) == LAYERS
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_model_that_the_user_has_compiled(make_trainer, how):
    """Hooks that come after a graph was made are not in it: the evaluation runs without it, and it stays."""
    torch._dynamo.reset()
    plain = tiny_model("llama")
    plain.eval()(torch.arange(12).view(2, 6))
    model = plain
    if how == "wrapped":
        model = torch.compile(plain, backend="eager")
    else:
        model.compile(backend="eager")
    model(torch.arange(12).view(2, 6))  # a graph without hooks
    trainer = make_trainer(LayerProbeCallback("avss"), model=model, remove_unused_columns=False, **EVALS)
    trainer.train()
    assert len(entries(trainer)) == 2
    plain._compiled_call_impl = None
    data = list(trainer.get_eval_dataloader())
    assert logged(entries(trainer)[0]) == pytest.approx(score_layers(plain, data, by="avss").values.tolist(), rel=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("adapters", ["merged", "base"])
def test_lora(make_trainer, adapters):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_model("llama"), lora)
    trainer = make_trainer(
        LayerProbeCallback(("avss", "docs", "drift"), adapters=adapters), model=model, learning_rate=0.5, **EVALS
    )
    before = docs(tiny_model("llama"))
    trainer.train()
    entry = entries(trainer)[-1]
    drift = [entry[f"layerprobe/drift/{adapters}/norm/layer_{i:02d}"] for i in range(LAYERS)]
    now = before if adapters == "base" else docs(trainer.model.merge_and_unload())
    assert entry[f"layerprobe/docs/{adapters}/q/mean_neighbour"] == pytest.approx(now.mean_neighbour("q"), abs=1e-6)
    assert (max(drift) == 0) if adapters == "base" else (min(drift) > 0)
    assert len(logged(entry)) == LAYERS  # activations are always those of the model with its adapters


def test_the_best_model_is_loaded_as_without(make_trainer, tmp_path):
    saving = dict(load_best_model_at_end=True, save_strategy="steps", save_steps=2, learning_rate=0.05, max_steps=6)

    def run(*callbacks):
        trainer = make_trainer(*callbacks, **saving, **EVALS)
        trainer.train()
        return trainer

    plain, probed = run(), run(LayerProbeCallback())
    assert plain.state.best_global_step == probed.state.best_global_step
    states = [trainer.model.state_dict() for trainer in (plain, probed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    probed.evaluate()
    assert logged(entries(probed)[-1]) == pytest.approx(expected(probed).tolist(), rel=1e-6)


def test_weights_that_zero_3_partitions_leave_the_activations(make_trainer, caplog, monkeypatch):
    """A stand-in: parameters that hold their values only while the model runs, as under DeepSpeed."""
    model = tiny_model("llama")
    values = {id(p): p.data for p in model.parameters()}

    def partition(*_):
        for parameter in model.parameters():
            parameter.ds_shape, parameter.data = values[id(parameter)].shape, torch.empty(0)

    def gather(*_):
        for parameter in model.parameters():
            parameter.data = values[id(parameter)]

    trainer = make_trainer(LayerProbeCallback(), model=model)
    model.register_forward_pre_hook(gather)
    model.register_forward_hook(partition)
    partition()
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.evaluate()
    (entry,) = entries(trainer)
    assert len(logged(entry)) == LAYERS and not logged(entry, "layerprobe/docs/")
    lines = [record.getMessage() for record in caplog.records if "DOCS" in record.getMessage()]
    assert len(lines) == 1 and "A weight of [32, 32] has no values here: DeepSpeed ZeRO-3" in lines[0]


def test_generation_in_an_evaluation_does_not_count(tmp_path):
    """Seq2SeqTrainer generates, and then takes the loss in a pass of its own, which is the one that counts."""
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=6,
        per_device_eval_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Seq2SeqTrainer(
        redrawn(T5ForConditionalGeneration(T5Config(**T5))),
        args,
        eval_dataset=rows(4, 2),
        callbacks=[LayerProbeCallback("avss"), LayerProbeCallback("influence", stack="decoder.block")],
        compute_metrics=lambda _: {},
    )
    trainer.evaluate()
    batches = list(trainer.get_eval_dataloader())
    encoder, decoder = entries(trainer)
    assert logged(encoder) == pytest.approx(score_layers(trainer.model, batches, by="avss").values.tolist(), rel=1e-6)
    found = score_layers(trainer.model, batches, by="influence", stack="decoder.block").values
    assert logged(decoder, "layerprobe/influence/decoder.block/") == pytest.approx(found.tolist(), rel=1e-6)


def test_scores_of_sublayers_and_of_samples(make_trainer):
    """Those that need activations inside layers, or keep tokens."""
    names = ("avss", "angular", "cka", "lid")
    trainer = make_trainer(LayerProbeCallback(names))
    trainer.evaluate()
    (entry,) = entries(trainer)
    for name in names:
        values = expected(trainer, name)
        assert logged(entry, f"layerprobe/{name}/") == pytest.approx(values.tolist(), rel=1e-5), name


def test_the_log_line_of_each_slice_is_for_info_only(make_trainer, caplog):
    trainer = make_trainer(LayerProbeCallback("docs", every=2))
    with caplog.at_level(logging.WARNING, "hf_layerprobe"):
        trainer.train()
    assert not caplog.records and not model_hooks(trainer.model)


def test_sft_trainer(tmp_path):
    import trl  # slow, and only needed here

    end = PruneOnTrainEndCallback(num_layers=1)
    texts = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 8})
    args = trl.SFTConfig(
        str(tmp_path), max_steps=4, max_length=32, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, **EVALS,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        tiny_model("llama"), args, train_dataset=texts, eval_dataset=texts, processing_class=tiny_tokenizer(),
        callbacks=[LayerProbeCallback(("avss", "docs", "drift")), end],
    )  # fmt: skip
    trainer.train()
    assert (
        end.before["loss"] == pytest.approx(trainer.evaluate()["eval_loss"]) and end.after["loss"] != end.before["loss"]
    )
    assert LayerProbeHistory.load(tmp_path)["avss"].shape == (2, LAYERS)
    assert logged(entries(trainer)[-1]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)

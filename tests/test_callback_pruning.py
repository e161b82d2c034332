"""Callbacks that remove layers: from the model in training, and beside the trained one."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from training import CHECKPOINTING, entries, rows
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from hf_layerprobe import (
    LayerProbeCallback,
    LayerProbeError,
    LayerProbeHistory,
    ProgressivePruningCallback,
    PruneOnTrainEndCallback,
    PruningError,
    PruningPlan,
    find_stacks,
    plan_pruning,
    prune_layers,
    score_layers,
)
from hf_layerprobe.hub import Access
from hf_layerprobe.surgery import in_place
from hf_layerprobe.surgery.in_place import prune_in_place

EVALS = dict(eval_strategy="steps", eval_steps=2)
STACKS = [(family, stack.path) for family in FAMILIES for stack in find_stacks(tiny_model(family))]


@pytest.mark.parametrize(("family", "path"), STACKS)
def test_in_place_is_the_same_model_as_a_new_one(family, path):
    model = tiny_model(family)
    expected = prune_layers(model, remove={path: [1]}, verify=False)
    kept = {id(module) for module in model.modules()} | {id(parameter) for parameter in model.parameters()}
    (stack,) = [found for found in find_stacks(model) if found.path == path]
    layer = stack.layers[1]
    gone = prune_in_place(stack, [1])
    assert {id(p) for p in gone} == {id(p) for p in layer.parameters()}
    assert kept >= {id(module) for module in model.modules()} | {id(parameter) for parameter in model.parameters()}
    assert model.config.to_dict() == expected.config.to_dict()
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_in_place_too_alignment_heads_follow_their_layers():
    model = tiny_model("whisper")
    model.generation_config.alignment_heads = [[1, 0], [4, 1]]
    prune_in_place(next(stack for stack in find_stacks(model) if "decoder" in stack.path), [1])
    assert model.generation_config.alignment_heads == [[3, 1]]


def test_in_place_leaves_the_model_as_it_was_when_the_check_fails(monkeypatch):
    model = tiny_model("llama")
    before, config = list(model.named_modules()), model.config.to_dict()
    monkeypatch.setattr(in_place, "differs", lambda *_: "they differ")
    with pytest.raises(PruningError, match=r"without layers \[1\].*they differ"):
        prune_in_place(find_stacks(model)[0], [1])
    assert list(model.named_modules()) == before and model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


class Watches(TrainerCallback):
    """What the optimizer and the learning rate are after each step."""

    def __init__(self):
        self.moments, self.rates, self.layers = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.moments.append({id(p): s["exp_avg"].clone() for p, s in optimizer.optimizer.state.items()})
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.layers.append(len(model.model.layers))


def test_layers_go_and_training_goes_on(make_trainer, tmp_path, caplog):
    before, after = Watches(), Watches()
    pruning = ProgressivePruningCallback({3: 1, 5: 1}, by="influence", window=2)
    probe = LayerProbeCallback(("influence", "docs", "drift"))
    trainer = make_trainer(
        before, pruning, after, probe, learning_rate=0.01, max_steps=8, save_strategy="steps", save_steps=4, **EVALS
    )
    model, embedding = trainer.model, trainer.model.model.embed_tokens.weight
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.model is model and model.model.embed_tokens.weight is embedding
    assert after.layers == [4, 4, 3, 3, 2, 2, 2, 2] and model.config.num_hidden_layers == 2
    assert before.rates == after.rates and after.rates == sorted(after.rates, reverse=True)
    for step in (3, 5):  # the optimizer knows the same of what stays, and nothing of what went
        known, left = before.moments[step - 1], after.moments[step - 1]
        assert len(known) - len(left) == 9 and all(torch.equal(known[key], moment) for key, moment in left.items())
    ids = {id(parameter) for parameter in model.parameters()}
    assert ids == set(after.moments[-1])
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == ids
    (first,), (second,) = pruning.removed[3], pruning.removed[5]
    assert (
        f"Removed layers [{first}] of 'model.layers' by influence, as numbered at the start; 3 are left" in caplog.text
    )
    assert [e["layerprobe/pruned/num_layers"] for e in entries(trainer, "layerprobe/pruned/")] == [3, 2]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-8")
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(saved.eval()(ids).logits, model.eval()(ids).logits)
    history = LayerProbeHistory.load(tmp_path / "out")
    missing = np.isnan(history["influence"])
    assert [np.flatnonzero(row).tolist() for row in missing] == [
        [],
        [first],
        sorted([first, second]),
        sorted([first, second]),
    ]
    assert (np.nanmin(history["drift/norm"][-1]) > 0) and np.isnan(history["drift/norm"][-1][first])


def test_what_follows_is_the_training_of_the_smaller_model(make_trainer):
    """With plain SGD nothing of the past is left but the weights."""

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.model = copy.deepcopy(model)

    copies, pruning = Copies(), ProgressivePruningCallback([2], by="docs")
    arguments = dict(learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1, max_steps=4)
    trainer = make_trainer(pruning, copies, **arguments)
    data = trainer.train_dataset
    trainer.train()
    model = copies.model.train()
    batches = list(make_trainer(**arguments).get_train_dataloader())
    assert len(model.model.layers) == 3
    for batch in batches[2:]:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        model.zero_grad()
    state = trainer.model.state_dict()
    assert data is not None and state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


def test_the_score_is_that_of_the_steps_before(make_trainer):
    class Keeps(TrainerCallback):
        step, batches = 0, ()

        def on_step_begin(self, args, state, control, **kwargs):
            self.step = state.global_step + 1

    keeps, pruning = Keeps(), ProgressivePruningCallback([3], by="influence", window=2)
    trainer = make_trainer(pruning, keeps)  # the learning rate is 0
    model = trainer.model
    before = copy.deepcopy(model)

    def take(_model, _args, kwargs):
        if keeps.step in (2, 3) and model.training:
            keeps.batches += ({k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)},)

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    trainer.train()
    handle.remove()
    assert len(keeps.batches) == 2
    assert pruning.removed == {3: score_layers(before, list(keeps.batches), by="influence").least_important(1)}


@pytest.mark.parametrize("arguments", [dict(bf16=True), {CHECKPOINTING: True}], ids=str)
def test_in_other_kinds_of_run(make_trainer, arguments):
    model = tiny_model("llama")
    model.config.use_cache = False
    watches, pruning = Watches(), ProgressivePruningCallback([2], window=1)
    trainer = make_trainer(pruning, watches, model=model, learning_rate=0.01, logging_steps=1, **arguments)
    trainer.train()
    assert watches.layers == [4, 3, 3, 3] and len(pruning.removed[2]) == 1
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert np.isfinite(losses).all()


def test_a_schedule_that_begins_anew(make_trainer):
    watches = Watches()
    pruning = ProgressivePruningCallback([4], scheduler="restart", by="docs")
    make_trainer(pruning, watches, learning_rate=0.01, max_steps=8, warmup_steps=2).train()
    assert watches.rates == pytest.approx([0.005, 0.01, 0.05 / 6, 0.0, 0.005, 0.01, 0.005, 0.0], abs=1e-9)


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_from_a_checkpoint_with_fewer_layers(make_trainer, tmp_path, restore):
    arguments = dict(
        learning_rate=0.01, max_steps=8, save_strategy="steps", save_steps=4, logging_steps=1,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    whole = make_trainer(ProgressivePruningCallback({2: 1, 6: 1}, by="docs"), **arguments)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    again = ProgressivePruningCallback({2: 1, 6: 1}, by="docs")
    trainer = make_trainer(again, model=LlamaForCausalLM.from_pretrained(checkpoint), **arguments)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (now,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressivePruningCallback)]
    (first,) = [c for c in whole.callback_handler.callbacks if isinstance(c, ProgressivePruningCallback)]
    assert now.removed == first.removed and list(now.removed) == [2, 6]
    assert all(torch.equal(t, trainer.model.state_dict()[n]) for n, t in whole.model.state_dict().items())
    (checkpoint / "optimizer.pt").unlink()  # with it, PyTorch itself refuses a model of another size
    wrong = make_trainer(ProgressivePruningCallback({2: 1, 6: 1}, by="docs"), **arguments)
    with pytest.raises(LayerProbeError, match="checkpoint of step 4 has 3 layers, and the model was built with 4"):
        wrong.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_is_one_of_the_last_depth(make_trainer, tmp_path):
    class Improves(TrainerCallback):
        """The metric is best before the removal."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_made_up"] = {2: 9.0, 4: 1.0, 6: 3.0, 8: 2.0}[state.global_step]

    trainer = make_trainer(
        ProgressivePruningCallback([3], by="docs"), Improves(), learning_rate=0.01, max_steps=8, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="made_up", greater_is_better=True, **EVALS,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 6
    best = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in best.items())


def test_where_no_layer_can_go_training_goes_on(make_trainer, monkeypatch, caplog):
    monkeypatch.setattr(in_place, "verify_pruned", lambda *_: (_ for _ in ()).throw(PruningError("it does not run")))
    pruning = ProgressivePruningCallback([2], by="docs")
    trainer = make_trainer(pruning)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.state.global_step == 4 and len(trainer.model.model.layers) == 4 and not pruning.removed
    assert "No layer was removed at step 2: it does not run" in caplog.text


def test_a_removal_that_never_comes_is_said(make_trainer, caplog):
    with caplog.at_level("WARNING", "hf_layerprobe"):
        make_trainer(ProgressivePruningCallback([9])).train()
    assert "will remove nothing: steps [9] do not come in this training (1 to 4)" in caplog.text


def test_the_same_removals_added_twice_count_once(make_trainer, caplog):
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer = make_trainer(*(ProgressivePruningCallback([2], by="docs") for _ in range(2)))
        trainer.train()
    assert len(trainer.model.model.layers) == 3
    assert "ProgressivePruningCallback was added twice with the same settings; the second one" in caplog.text


def test_more_layers_than_there_are(make_trainer):
    with pytest.raises(LayerProbeError, match="would remove 4 of the 4 layers of 'model.layers'; one must stay"):
        make_trainer(ProgressivePruningCallback({1: 2, 2: 2})).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(at=[]), "at is a mapping"),
        (dict(at=200), "at is a mapping of steps to numbers of layers, or a list of steps; got 200"),
        (dict(at="often"), "at is a mapping"),
        (dict(at=[2.5]), "at is a mapping"),
        (dict(at={2: 1.0}), "at is a mapping"),
        (dict(at={0: 1}), "at is a mapping"),
        (dict(at={3: 0}), "at is a mapping"),
        (dict(at=[3], window=0), "window is a positive number"),
        (dict(at=[3], scheduler="anew"), "scheduler is 'keep' or 'restart', got 'anew'"),
        (dict(at=[3], by="influense"), "Did you mean 'influence'"),
        (dict(at=[3], by="taylor"), "cannot prune by 'taylor'"),
    ],
)
def test_progressive_refusals(arguments, message):
    with pytest.raises(LayerProbeError, match=message):
        ProgressivePruningCallback(**arguments)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_pruned_model_beside_the_trained_one(make_trainer, tmp_path, caplog, bf16):
    callback = PruneOnTrainEndCallback(0.25, by="influence")
    trainer = make_trainer(LayerProbeCallback("influence"), callback, learning_rate=0.01, bf16=bf16, **EVALS)
    trainer.processing_class = trainer.callback_handler.processing_class = tiny_tokenizer()
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert len(trainer.model.model.layers) == 4
    folder = tmp_path / "out" / "pruned-4"
    plan = PruningPlan.load(folder)
    values = score_layers(trainer.model, list(trainer.get_eval_dataloader()), by="influence")
    assert list(plan.remove) == values.least_important(1) and plan.by == "influence"
    assert plan.scores["values"] == pytest.approx(values.values.tolist(), rel=0.2 if bf16 else 1e-5)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.config.num_hidden_layers == 3 and (folder / "tokenizer.json").is_file()
    state = callback.pruned.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())
    assert "forward" not in vars(callback.pruned)
    last = trainer.state.log_history[-1]
    assert last["layerprobe/dense/loss"] == callback.before["loss"] == trainer.evaluate()["eval_loss"]
    assert last["layerprobe/pruned/loss"] == callback.after["loss"]
    other = make_trainer(model=saved, bf16=bf16)
    assert other.evaluate()["eval_loss"] == pytest.approx(callback.after["loss"], rel=1e-6)
    assert f"loss: {callback.before['loss']:.4g} -> {callback.after['loss']:.4g}" in caplog.text
    assert [e["step"] for e in entries(trainer, "layerprobe/influence/")][:2] == [2, 4]  # none from its own evaluation


def test_the_pruned_model_is_pushed_with_the_trainers_settings(make_trainer, monkeypatch, tmp_path):
    pushed = {}
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/tuned")
    )
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    monkeypatch.setattr("hf_layerprobe.prune.check_push", lambda repo_id, **_options: Access(repo_id))
    monkeypatch.setattr(
        "hf_layerprobe.prune.push_model",
        lambda folder, repo_id, **options: pushed.update(options, folder=folder, repo_id=repo_id),
    )
    settings = dict(push_to_hub=True, hub_private_repo=True, hub_revision="smaller", hub_token="a-token")
    make_trainer(PruneOnTrainEndCallback(num_layers=1, by="docs"), **settings).train()
    assert pushed.pop("folder") == tmp_path / "out" / "pruned-4"
    del pushed["commit_message"]
    assert pushed == {"repo_id": "me/tuned-pruned", "private": True, "revision": "smaller", "token": "a-token"}
    assert not any("a-token" in path.read_text() for path in (tmp_path / "out" / "pruned-4").glob("*.json"))


def test_what_goes_wrong_at_the_end_is_one_line(make_trainer, tmp_path, caplog):
    (tmp_path / "out" / "pruned-4").mkdir(parents=True)
    (tmp_path / "out" / "pruned-4" / "mine").write_text("")
    trainer = make_trainer(PruneOnTrainEndCallback(num_layers=1))
    with caplog.at_level("WARNING", "hf_layerprobe"):
        result = trainer.train()
    assert result.global_step == 4
    (line,) = [r.getMessage() for r in caplog.records if "not pruned" in r.getMessage()]
    assert "pruned-4 exists and is not an empty folder" in line

    caplog.clear()
    trainer = make_trainer(PruneOnTrainEndCallback(num_layers=1))
    trainer.eval_dataset = None
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert "avss is measured on evaluation batches, and the Trainer has no eval_dataset" in caplog.text


def test_weights_alone_need_no_evaluation_data(make_trainer):
    callback = PruneOnTrainEndCallback(num_layers=2, by="docs")
    trainer = make_trainer(callback)
    trainer.eval_dataset = None
    trainer.train()
    assert callback.pruned.config.num_hidden_layers == 2 and not callback.before and not callback.after


def test_several_evaluation_data_sets_at_the_end(make_trainer):
    callback = PruneOnTrainEndCallback(num_layers=1)
    trainer = make_trainer(callback, evaluation={"near": rows(4, 3), "far": rows(3, 4)})
    trainer.train()
    assert {"near_loss", "far_loss"} == set(callback.before) == set(callback.after)
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ratio=1.5), "ratio is the share of layers to remove, between 0 and 1; got 1.5"),
        (dict(num_layers=4), "num_layers to remove must be between 1 and 3 of 4; got 4"),
        (dict(num_layers=1, stack="model.blocks"), "no stack 'model.blocks'"),
    ],
)
def test_train_end_refusals_before_training(make_trainer, arguments, message):
    trainer = make_trainer(PruneOnTrainEndCallback(**arguments))
    with pytest.raises(LayerProbeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_same_pruning_at_the_end_added_twice_counts_once(make_trainer, caplog):
    first, second = PruneOnTrainEndCallback(num_layers=1, by="docs"), PruneOnTrainEndCallback(num_layers=1, by="docs")
    with caplog.at_level("WARNING", "hf_layerprobe"):
        make_trainer(first, second).train()
    assert first.pruned is not None and second.pruned is None
    assert "PruneOnTrainEndCallback was added twice" in caplog.text and "not pruned" not in caplog.text


@pytest.mark.parametrize("how", ["PeftModel", "add_adapter"])
def test_adapters(make_trainer, how):
    """A copy is pruned with its adapters at the end; on the way, checkpoints would have no base model to go with."""
    lora, model = LoraConfig(target_modules=["q_proj"], init_lora_weights=False), tiny_model("llama")
    if how == "PeftModel":
        model = get_peft_model(model, lora)
    else:
        model.add_adapter(lora)
    with pytest.raises(LayerProbeError, match="adapters saved on the way would fit a base model that is saved nowhere"):
        make_trainer(ProgressivePruningCallback([2]), model=model).train()
    if how == "PeftModel":
        end = PruneOnTrainEndCallback(num_layers=1, by="influence")
        make_trainer(end, model=model).train()
        assert type(end.pruned) is PeftModel and end.pruned.get_base_model().config.num_hidden_layers == 3
        assert end.before["loss"] != end.after["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of ratio and num_layers"),
        (dict(ratio=0.5, num_layers=1), "exactly one of ratio and num_layers"),
        (dict(ratio=0.5, by="taylor"), "runs the model by itself"),
    ],
)
def test_train_end_refusals(arguments, message):
    with pytest.raises(LayerProbeError, match=message):
        PruneOnTrainEndCallback(**arguments)


@pytest.mark.parametrize("when", ["end", "during"])
def test_angular_distance_removes_a_block(make_trainer, when):
    """As for a plan, even where two single layers turn the stream less."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in (model.model.layers[0], model.model.layers[2]):
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    if when == "end":
        callback = PruneOnTrainEndCallback(num_layers=2, by="angular")
    else:
        callback = ProgressivePruningCallback({2: 2}, by="angular")
    trainer = make_trainer(callback, model=model)
    batches = list(trainer.get_eval_dataloader())
    wanted = plan_pruning(model, batches, num_layers=2, by="angular").remove
    trainer.train()
    if when == "during":
        first, second = callback.removed[2]
        assert second == first + 1
        return
    assert callback.plan.remove == wanted and wanted[1] == wanted[0] + 1
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert (
        callback.plan.data["calibration"] == callback.plan.scores["data"] == {"tokens": tokens, "batches": len(batches)}
    )

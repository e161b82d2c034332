"""`LayerProbeCallback` in real Trainer runs: what is logged, when, where, and that training does not notice."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from training import AVSS, LAYERS, entries, expected, logged, model_hooks, rows, steps
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_layerprobe import LayerProbeError, docs
from hf_layerprobe.activations.masks import TokenMasks
from hf_layerprobe.callbacks import LayerProbeCallback


def test_an_entry_holds_the_scores_of_the_evaluation_batches(make_trainer):
    names = ("avss", "avss-published", "avss-released", "influence", "docs")
    trainer = make_trainer(LayerProbeCallback(names), eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [e["step"] for e in entries(trainer)] == [2, 4]
    similarity = docs(trainer.model)
    for entry in entries(trainer):
        assert entry["epoch"] == entry["step"] / 4
        for name in names[:-1]:
            assert [entry[f"layerprobe/{name}/layer_{i:02d}"] for i in range(LAYERS)] == pytest.approx(
                expected(trainer, name).tolist(), rel=1e-6
            )
        for kind in similarity.kinds:
            excess = np.diagonal(similarity.excess(kind), 1).mean()
            assert entry[f"layerprobe/docs/{kind}/mean_neighbour"] == pytest.approx(similarity.mean_neighbour(kind))
            assert entry[f"layerprobe/docs/{kind}/mean_neighbour_excess"] == pytest.approx(excess)
        assert len(entry) == 2 + 4 * LAYERS + 2 * len(similarity.kinds)
        assert all(type(value) is float for name, value in entry.items() if name != "step")
    json.dumps(trainer.state.log_history)


def test_padding_does_not_count(make_trainer):
    """What stands at masked places changes no number; the same places unmasked do."""

    def run(ids_at_padding, masked):
        data = rows(4, seed=2, padding=2).to_dict()
        for i in (0, 2):
            data["input_ids"][i][4:] = [ids_at_padding] * 2
            data["attention_mask"][i][4:] = [0 if masked else 1] * 2
        trainer = make_trainer(LayerProbeCallback("avss"), evaluation=Dataset.from_dict(data))
        trainer.evaluate()
        return logged(entries(trainer)[0])

    assert run(3, masked=True) == pytest.approx(run(40, masked=True), rel=1e-6)
    assert run(3, masked=False) != pytest.approx(run(40, masked=False), rel=1e-3)


def test_trackers_get_the_numbers_and_printers_do_not(make_trainer, tmp_path, capsys):
    class Sees(TrainerCallback):
        logs = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs += tuple(logs)

        def on_evaluate(self, args, state, control, **kwargs):
            self.should_log = control.should_log

    other = Sees()
    trainer = make_trainer(
        LayerProbeCallback(), other, eval_strategy="steps", eval_steps=2, report_to=["tensorboard"], logging_steps=1
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    first, second = entries(trainer)
    names = [name for name in first if name.startswith("layerprobe/")]
    assert {f"layerprobe/docs/{kind}/mean_neighbour" for kind in "qkvo"} | set(AVSS) <= set(names)
    for name in names:
        points = events.Scalars(f"train/{name}")
        assert [point.step for point in points] == [2, 4]
        assert [point.value for point in points] == pytest.approx([first[name], second[name]], rel=1e-6)
    assert "eval_loss" in other.logs
    assert "layerprobe" not in " ".join(other.logs) + capsys.readouterr().out
    assert other.should_log is False
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 4]


def test_only_the_main_process_logs(make_trainer):
    trainer = make_trainer(LayerProbeCallback(), eval_strategy="steps", eval_steps=2)
    trainer.is_world_process_zero = lambda: False
    trainer.state.is_world_process_zero = False
    trainer.train()
    trainer.evaluate()
    assert not entries(trainer)


def test_every_epoch(make_trainer):
    arguments = dict(eval_strategy="steps", eval_steps=3, max_steps=-1, num_train_epochs=3)
    trainer = make_trainer(LayerProbeCallback(every="epoch"), **arguments)
    trainer.train()
    # Evaluations at 3, 6, 9 and 12; epochs end at 4, 8 and 12.
    assert steps(trainer, "layerprobe/docs/") == [4, 8, 12]
    assert steps(trainer, "layerprobe/avss/") == [6, 9, 12]


def test_every_epoch_with_an_evaluation_an_epoch_and_an_epoch_cut_short(make_trainer):
    trainer = make_trainer(LayerProbeCallback(every="epoch"), eval_strategy="epoch", max_steps=6)
    trainer.train()
    assert steps(trainer, "layerprobe/docs/") == [4, 6]
    assert steps(trainer, "layerprobe/avss/") == [4, 6]


def test_every_number_of_steps(make_trainer):
    trainer = make_trainer(LayerProbeCallback(every=3), eval_strategy="steps", eval_steps=2, max_steps=10)
    trainer.train()
    # Evaluations at 2, 4, 6, 8, 10.
    assert steps(trainer, "layerprobe/docs/") == [3, 6, 9]
    assert steps(trainer, "layerprobe/avss/") == [4, 6, 10]


def test_docs_needs_no_evaluation_and_activations_warn_without_one(make_trainer, caplog):
    logger = "hf_layerprobe.callbacks"
    with caplog.at_level("WARNING", logger):
        trainer = make_trainer(LayerProbeCallback("docs", every=2, kinds=["v", "gate"]))
        trainer.train()
    assert steps(trainer, "layerprobe/") == [2, 4]
    assert {name.split("/")[2] for name in entries(trainer)[0] if "/" in name} == {"v", "gate"}
    assert not caplog.records
    with caplog.at_level("WARNING", logger):
        make_trainer(LayerProbeCallback("avss")).train()
    assert "eval_strategy='no'" in caplog.text


def test_docs_follows_the_weights(make_trainer):
    trainer = make_trainer(LayerProbeCallback("docs", every=1), learning_rate=0.1, max_steps=2)
    trainer.train()
    first, second = (logged(e, "layerprobe/docs/q/") for e in entries(trainer))
    assert first != second
    assert second[0] == pytest.approx(docs(trainer.model).mean_neighbour("q"))


def test_evaluations_outside_training(make_trainer):
    """Before and after train(), whatever `every` is, and with the weights of that moment."""
    trainer = make_trainer(LayerProbeCallback(every=100), learning_rate=0.05, max_steps=2)
    trainer.evaluate()
    evaluation, first = trainer.state.log_history
    before = expected(trainer)
    trainer.train()  # which starts a new history
    trainer.evaluate()
    trainer.evaluate()
    others = entries(trainer, "layerprobe/avss/")
    assert logged(first) == pytest.approx(before.tolist(), rel=1e-6)
    assert len(others) == 2
    for entry in others:
        assert logged(entry) == pytest.approx(expected(trainer).tolist(), rel=1e-6)
    assert logged(others[0]) != pytest.approx(before.tolist(), rel=1e-3)
    assert {**first, **evaluation} == {**evaluation, **first}  # the same step and epoch
    assert [others[0]["step"], others[1]["step"]] == [2, 2]
    assert all("layerprobe/docs/q/mean_neighbour" in entry for entry in (first, *others))


def test_only_evaluation_batches_count(make_trainer):
    """Neither predict(), nor the user's own passes, nor an evaluation that broke off, reach the next numbers."""
    trainer = make_trainer(LayerProbeCallback("avss"))
    ids = torch.arange(12).view(2, 6)

    class Breaks(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer.predict(rows(3, seed=9))
    trainer.model.eval()(ids)
    trainer.evaluate()
    trainer.model.generate(ids, max_new_tokens=2, do_sample=False)
    trainer.evaluate()
    for entry in entries(trainer):
        assert logged(entry) == pytest.approx(expected(trainer).tolist(), rel=1e-6)
    assert len(entries(trainer)) == 2
    trainer.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(rows(4, seed=9))
    trainer.remove_callback(Breaks)
    trainer.evaluate()
    assert len(entries(trainer)) == 3
    assert logged(entries(trainer)[2]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)


def test_several_data_sets_are_told_apart(make_trainer):
    sets = {"near": rows(4, seed=3), "far": rows(3, seed=4, padding=3)}
    trainer = make_trainer(LayerProbeCallback(every=2), evaluation=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert steps(trainer, "layerprobe/avss/") == [2, 2, 4, 4]
    near, far = entries(trainer, "layerprobe/avss/")[:2]
    for name, entry in (("near", near), ("far", far)):
        assert len(logged(entry)) == LAYERS
        assert logged(entry, f"layerprobe/avss/{name}/layer_0") == pytest.approx(
            expected(trainer, data=name).tolist(), rel=1e-6
        )
    trainer.evaluate(rows(2, seed=5), metric_key_prefix="test")
    assert "layerprobe/avss/test/layer_00" in entries(trainer)[-1]


def test_docs_once_a_step_for_several_data_sets(make_trainer):
    sets = {"near": rows(2, seed=3), "far": rows(2, seed=4)}
    trainer = make_trainer(LayerProbeCallback(), evaluation=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert steps(trainer, "layerprobe/avss/") == [2, 2, 4, 4]
    assert steps(trainer, "layerprobe/docs/") == [2, 4]


def test_added_later(make_trainer, caplog):
    trainer = make_trainer(eval_strategy="steps", eval_steps=2)
    trainer.add_callback(LayerProbeCallback())
    trainer.train()
    assert steps(trainer, "layerprobe/avss/") == [2, 4]

    trainer = make_trainer()
    trainer.add_callback(LayerProbeCallback("avss"))
    with caplog.at_level("WARNING", "hf_layerprobe.callbacks"):
        trainer.evaluate()
    assert not entries(trainer)
    assert "of 3 batches, 3 could not be measured" in caplog.text
    trainer.evaluate()
    assert logged(entries(trainer)[0]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)

    trainer, callback = make_trainer(), LayerProbeCallback("avss")
    trainer.add_callback(callback)
    callback.open(trainer)
    trainer.evaluate()
    assert logged(entries(trainer)[0]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)


def test_training_is_bit_identical(make_trainer):
    def run(*callbacks):
        torch.manual_seed(0)
        # Dropout draws random numbers in every training pass: one drawn by the callback would show.
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=64,
            attention_dropout=0.2,
        )
        trainer = make_trainer(
            *callbacks,
            model=LlamaForCausalLM(config),
            learning_rate=0.01,
            max_steps=9,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
        )
        trainer.train()
        losses = [e[key] for e in trainer.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in e]
        return trainer, losses, trainer.model.state_dict()

    _, losses, weights = run()
    trainer, losses_with, weights_with = run(LayerProbeCallback(("avss", "influence", "docs")))
    assert len(entries(trainer)) == 3 and len(losses) == 9 + 9 + 3
    assert losses == losses_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)


def test_hooks_are_there_while_the_model_evaluates_and_no_longer(make_trainer):
    between, within = [], {True: set(), False: set()}

    class Looks(TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            between.append(model_hooks(model))

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            within[True].add(model_hooks(model))

    callback = LayerProbeCallback()
    trainer = make_trainer(callback, Looks(), Steps(), eval_strategy="steps", eval_steps=2)
    model = trainer.model
    assert model_hooks(model) == 0
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: within[model.training].add(len(layer._forward_hooks)))
    trainer.train()
    handle.remove()
    assert within == {True: {0, 1}, False: {1}}  # outside of passes the one above
    assert set(between) == {3}
    assert model_hooks(model) == 0
    callback.close()
    assert "evaluation_loop" not in vars(trainer)
    trainer.evaluate()
    assert len(entries(trainer)) == 3  # joined again by the batch it saw, and said that it missed the first


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("batches", ["evaluation", "training"])
def test_no_hook_is_left_when_a_pass_breaks_off(make_trainer, error, batches):
    trainer = make_trainer(LayerProbeCallback("avss", every=2, batches=batches), eval_strategy="steps", eval_steps=2)
    model = trainer.model
    seen = []

    def breaks(_module, _inputs):
        if trainer.state.global_step >= 1 and model.training == (batches == "training"):
            seen.append(model_hooks(model))
            raise error

    handle = model.model.layers[2].register_forward_pre_hook(breaks)
    with pytest.raises(error):
        trainer.train()
    handle.remove()
    assert seen == [2 + LAYERS + 1]
    assert model_hooks(model) == 0


def test_a_callback_can_be_sent_to_another_process(make_trainer):
    callback = pickle.loads(pickle.dumps(LayerProbeCallback(("avss", "influence", "docs", "drift"), every=2)))
    trainer = make_trainer(callback, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert steps(trainer, "layerprobe/avss/") == [2, 4]


def test_a_new_model_is_followed(make_trainer):
    """`model_init` gives train() another model than the one seen at the start."""
    trainer = make_trainer(LayerProbeCallback(), eval_strategy="steps", eval_steps=2, learning_rate=0.01)
    old = trainer.model
    trainer.model_init = lambda: tiny_model("llama", seed=5)
    trainer.train()
    assert trainer.model is not old
    assert steps(trainer, "layerprobe/avss/") == [2, 4]
    assert logged(entries(trainer)[-1]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)


def test_the_model_can_be_copied_and_saved(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback())
    trainer.evaluate()
    copied = copy.deepcopy(trainer.model)
    buffer = io.BytesIO()
    torch.save(trainer.model, buffer)
    buffer.seek(0)
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.arange(12).view(2, 6)
    for other in (
        copied,
        torch.load(buffer, weights_only=False),
        LlamaForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        other.eval()
        assert torch.equal(other(ids).logits, trainer.model.eval()(ids).logits)
    # A copy that runs must not write into the numbers of the original.
    trainer.evaluate()
    assert logged(entries(trainer)[1]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)


def test_copies_and_files_made_during_an_evaluation_watch_nothing(make_trainer):
    trainer = make_trainer(LayerProbeCallback())
    copies = []

    class Copies(TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copies.extend((copy.deepcopy(model), torch.load(buffer, weights_only=False)))

    trainer.add_callback(Copies())
    trainer.evaluate()
    for other in copies:
        assert model_hooks(other) == 2  # what PyTorch carries along
        for hook in (*other._forward_pre_hooks.values(), *other._forward_hooks.values()):
            assert hook.__self__.stack is None and not hook.__self__.accumulators
        other.eval()(torch.arange(12).view(2, 6))
        assert not any(layer._forward_hooks for layer in other.model.layers)


def test_padding_that_cannot_be_told_apart_does_not_stop_training(make_trainer, caplog, monkeypatch):
    def refuse(_masks, _hidden):
        raise LayerProbeError("which of those are padding is unknown")

    monkeypatch.setattr(TokenMasks, "fit", refuse)
    trainer = make_trainer(LayerProbeCallback("avss"))
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.evaluate()
    assert not entries(trainer)
    assert "not measured: which of those" in caplog.text and "avss are not logged" in caplog.text


def test_weights_gone_to_nan_do_not_stop_training(make_trainer, caplog):

    class Ruins(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)

    trainer = make_trainer(Ruins(), LayerProbeCallback(), eval_strategy="steps", eval_steps=2)
    with caplog.at_level("WARNING", "hf_layerprobe.callbacks"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert not entries(trainer)
    assert "DOCS is not logged at step 2: Cannot use the q matrix" in caplog.text
    assert "avss is not logged: it is not finite for layers [0, 1, 2, 3]" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scores=()), "no scores"),
        (dict(scores=("influense",)), "Did you mean 'influence'"),
        (dict(scores=("avss", "random")), "cannot log random"),
        (dict(scores="last"), "cannot log last.*avss-published"),
        (dict(every="step"), "got 'step'"),
        (dict(every=0), "got 0"),
        (dict(every=True), "got True"),
        (dict(every=2.0), "got 2.0"),
    ],
)
def test_refusals_at_construction(arguments, message):
    with pytest.raises(LayerProbeError, match=message):
        LayerProbeCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stack="model.blocks"), "no stack 'model.blocks'; its stacks are 'model.layers'"),
        (dict(kinds=["x"]), "Unknown matrix kinds"),
    ],
)
def test_refusals_when_the_trainer_is_built(make_trainer, arguments, message):
    with pytest.raises(LayerProbeError, match=message):
        make_trainer(LayerProbeCallback(**arguments))


def test_a_model_without_a_stack_is_refused(make_trainer):
    class Flat(torch.nn.Linear):
        pass

    with pytest.raises(LayerProbeError, match="Flat has no repeated list of layers"):
        make_trainer(LayerProbeCallback(), model=Flat(2, 2))

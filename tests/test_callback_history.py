"""The run on disk, read back; runs that go on; and what is asked for but cannot come."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import tiny_model
from training import AVSS, LAYERS, entries, expected, logged, rows, steps
from transformers import TrainerCallback

from hf_layerprobe import LayerProbeCallback, LayerProbeError, LayerProbeHistory, docs
from hf_layerprobe.files import write_atomically

EVALS = dict(eval_strategy="steps", eval_steps=2)


class Stops(TrainerCallback):
    """A kill in the middle of training."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_history_is_what_was_logged(make_trainer, tmp_path):
    trainer = make_trainer(
        LayerProbeCallback(("avss", "docs", "drift"), maps=True), learning_rate=0.05, max_steps=6, **EVALS
    )
    trainer.train()
    history = LayerProbeHistory.load(tmp_path / "out")
    assert LayerProbeHistory.load(tmp_path / "out" / "layerprobe").names == history.names
    assert history.steps["avss"].tolist() == [2, 4, 6] and history.epochs["avss"].tolist() == [0.5, 1.0, 1.5]
    found = entries(trainer)
    np.testing.assert_array_equal(history["avss"], [[e[name] for name in AVSS] for e in found])
    np.testing.assert_array_equal(
        history["drift/norm"], [[e[f"layerprobe/drift/norm/layer_{i:02d}"] for i in range(LAYERS)] for e in found]
    )
    kinds = [name.split("/")[1] for name in history.names if name.startswith("docs/")]
    np.testing.assert_allclose(
        history["drift/norm"], np.mean([history[f"drift/norm/{kind}"] for kind in kinds], axis=0), rtol=1e-12
    )
    now = docs(trainer.model)
    assert set(kinds) == set(now.kinds)
    off_diagonal = ~np.eye(LAYERS, dtype=bool)
    np.testing.assert_allclose(history["docs/up"][-1][off_diagonal], now["up"][off_diagonal], atol=1e-9)
    assert (np.diff(history["drift/norm"], axis=0) > 0).all()  # weights go on moving
    assert history.about["drift/norm"]["since_step"] == 0 and history.about["docs/q"]["pairs"] == 6
    with pytest.raises(KeyError, match="no 'eavss' in this run; measured: avss, docs/down, "):
        history["eavss"]


def test_data_frames_and_the_figure(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback(), **EVALS)
    trainer.train()
    history = LayerProbeHistory.load(tmp_path / "out")
    frame = history.to_pandas("avss")
    assert frame.index.tolist() == [2, 4] and frame.columns.tolist() == [0, 1, 2, 3]
    assert history.to_pandas("docs/q").columns.tolist() == ["0-1", "1-2", "2-3"]
    assert history.to_pandas("docs/q").loc[4, "1-2"] == pytest.approx(docs(trainer.model)["q"][1, 2])
    for names in (None, ["avss"]):
        assert history.plot(tmp_path / "history.png", names).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        history.plot(tmp_path / "no.png", ["eavss"])


def test_another_place_for_the_history(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback("docs", every=2, output_dir=tmp_path / "elsewhere"))
    trainer.train()
    assert LayerProbeHistory.load(tmp_path / "elsewhere").steps["docs/q"].tolist() == [2, 4]
    assert not (tmp_path / "out" / "layerprobe").exists()
    json.dumps(LayerProbeCallback(output_dir=tmp_path).state())


def test_data_sets_of_one_step_are_one_file(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback(), evaluation={"near": rows(2, 3), "far": rows(2, 4)}, **EVALS)
    trainer.train()
    history = LayerProbeHistory.load(tmp_path / "out")
    assert {"avss/near", "avss/far"} < set(history.names)
    assert history["avss/near"].shape == (2, LAYERS)
    assert len(list((tmp_path / "out" / "layerprobe").iterdir())) == 2


@pytest.mark.parametrize("restore", [False, True])
def test_a_killed_run_goes_on_without_double_entries(make_trainer, tmp_path, restore):
    arguments = dict(
        learning_rate=0.05,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        restore_callback_states_from_checkpoint=restore,
        **EVALS,
    )
    whole = make_trainer(LayerProbeCallback(("avss", "docs", "drift")), **arguments)
    whole.train()
    expected_history, expected_log = LayerProbeHistory.load(tmp_path / "out"), entries(whole)
    (tmp_path / "out").rename(tmp_path / "whole")

    trainer = make_trainer(LayerProbeCallback(("avss", "docs", "drift")), Stops(7), **arguments)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert LayerProbeHistory.load(tmp_path / "out").steps["avss"].tolist() == [2, 4, 6]
    # A callback with other arguments: those of the checkpoint count if the Trainer is told so.
    trainer = make_trainer(LayerProbeCallback(("avss", "docs", "drift"), max_seconds=77.0), **arguments)
    trainer.train(resume_from_checkpoint=True)
    (now,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, LayerProbeCallback)]
    assert now.max_seconds == (10.0 if restore else 77.0)
    history = LayerProbeHistory.load(tmp_path / "out")
    assert [e["step"] for e in entries(trainer)] == [2, 4, 6, 8]
    for name in expected_history.names:
        assert history.steps[name].tolist() == [2, 4, 6, 8]
        np.testing.assert_allclose(history[name], expected_history[name], rtol=1e-6)
    for one, other in zip(entries(trainer), expected_log, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_callback_that_the_checkpoint_did_not_have(make_trainer):
    """The Trainer saves states of callbacks into places that it expects from the checkpoint."""
    saving = dict(save_strategy="steps", save_steps=2, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(Stops(3), **saving).train()
    trainer = make_trainer(LayerProbeCallback("docs", every=1), **saving)
    trainer.train(resume_from_checkpoint=True)
    assert steps(trainer, "layerprobe/docs/") == [3, 4, 5, 6]


def test_two_callbacks_keep_their_own_states(make_trainer, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    first, second = LayerProbeCallback("docs", every=3), LayerProbeCallback("drift", every=2)
    trainer = make_trainer(first, second, **saving)
    trainer.train()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        state = json.loads((tmp_path / "out" / checkpoint / "trainer_state.json").read_text())
        saved = state["stateful_callbacks"]["LayerProbeCallback"]
        assert [one["args"]["scores"] for one in saved] == [["docs"], ["drift"]]
    assert steps(trainer, "layerprobe/docs/") == [3] and steps(trainer, "layerprobe/drift/") == [2, 4]


def test_drift_goes_on_from_the_step_where_no_start_was_kept(make_trainer, tmp_path, caplog):
    saving = dict(save_strategy="steps", save_steps=2, learning_rate=0.05)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(Stops(3), **saving).train()
    trainer = make_trainer(LayerProbeCallback("drift", every=4), **saving)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train(resume_from_checkpoint=True)
    assert "Drift is measured from step 2 on" in caplog.text
    assert LayerProbeHistory.load(tmp_path / "out").about["drift/norm"]["since_step"] == 2


def test_another_run_in_the_same_place_is_moved_aside(make_trainer, tmp_path, caplog):
    make_trainer(LayerProbeCallback("docs", every=2)).train()
    before = LayerProbeHistory.load(tmp_path / "out")["docs/q"]
    trainer = make_trainer(LayerProbeCallback("docs", every=1), model=tiny_model("llama", seed=3))
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert "moved the snapshots of another run to layerprobe.1" in caplog.text
    assert LayerProbeHistory.load(tmp_path / "out").steps["docs/q"].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(LayerProbeHistory.load(tmp_path / "out" / "layerprobe.1")["docs/q"], before)


def test_an_evaluation_before_training_belongs_to_the_run(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback("avss"), **EVALS)
    trainer.evaluate()
    trainer.train()
    assert LayerProbeHistory.load(tmp_path / "out").steps["avss"].tolist() == [0, 2, 4]


def test_damaged_and_missing_histories_are_refused(make_trainer, tmp_path):
    with pytest.raises(LayerProbeError, match="has no snapshots of LayerProbeCallback"):
        LayerProbeHistory.load(tmp_path)
    make_trainer(LayerProbeCallback("docs", every=2)).train()
    file = tmp_path / "out" / "layerprobe" / "step-00000004.safetensors"
    content = file.read_bytes()
    write_atomically(file, content[:100])
    with pytest.raises(LayerProbeError, match="step-00000004.safetensors is not a snapshot"):
        LayerProbeHistory.load(tmp_path / "out")
    write_atomically(file, content.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(LayerProbeError, match="newer version"):
        LayerProbeHistory.load(tmp_path / "out")


def test_a_folder_that_cannot_be_written_ends_no_training(make_trainer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(LayerProbeCallback(("docs", "drift"), every=2, output_dir=tmp_path / "file"))
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.state.global_step == 4 and steps(trainer, "layerprobe/docs/") == [2, 4]
    assert "Snapshots are not written to" in caplog.text and "Drift will not be logged" in caplog.text


def test_snapshots_hold_arrays_and_json_alone(make_trainer, tmp_path):
    make_trainer(LayerProbeCallback("docs", every=2)).train()
    with safe_open(tmp_path / "out" / "layerprobe" / "step-00000002.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["hf_layerprobe"])
    assert header["format"] == 1 and header["step"] == 2
    assert header["about"]["docs/q"]["stack"] == "model.layers" and header["about"]["docs/q"]["layers"] == [0, 1, 2, 3]


def test_listed_steps(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback(every=[3, 1, 3]), **EVALS)
    trainer.train()
    assert steps(trainer, "layerprobe/docs/") == [1, 3]
    assert steps(trainer, "layerprobe/avss/") == [2, 4]


@pytest.mark.parametrize(
    ("callback", "arguments", "line"),
    [
        (dict(every=9), {}, "will log nothing in this training: every=9 names no step of 1 to 4"),
        (dict(every=[5, 6]), {}, r"every=[5, 6] names no step of 1 to 4"),
        (dict(scores="docs"), {}, "every='eval', and this training runs no evaluation"),
        (dict(every=2), {}, "avss are measured on evaluation batches, and this training runs no evaluation"),
        (dict(every=4), dict(eval_delay=9, **EVALS), "avss: no evaluation came after step 4"),
    ],
)
def test_what_never_comes_is_said_in_one_line(make_trainer, caplog, callback, arguments, line):
    trainer = make_trainer(LayerProbeCallback(**callback), **arguments)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [record.getMessage() for record in caplog.records if line in record.getMessage()]
    assert len(caplog.records) == 1


def test_an_evaluation_without_data_is_said_in_one_line(make_trainer, caplog):
    trainer = make_trainer(LayerProbeCallback(), evaluation=rows(2, 3).select([]))
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.evaluate()
    assert [record.getMessage() for record in caplog.records] == ["avss are not logged: there were no batches."]
    assert "layerprobe/docs/q/mean_neighbour" in entries(trainer)[0]


def test_a_bounded_slice_is_said_in_the_log(make_trainer, caplog):
    trainer = make_trainer(LayerProbeCallback(("docs", "drift"), every=4, max_seconds=0, sample=8))
    with caplog.at_level("INFO", "hf_layerprobe"):
        trainer.train()
    assert "DOCS: 1 of 21 pairs of matrices in 0.0" in caplog.text and "8 vectors of each matrix" in caplog.text
    assert "Drift: 1 of 28 matrices in" in caplog.text and "max_seconds=0 allows no more" in caplog.text
    (entry,) = entries(trainer)
    assert sum(name.startswith("layerprobe/drift/norm/") for name in entry) == 1


@pytest.mark.parametrize("twin", ["the same object", "the same settings"])
def test_a_callback_added_twice_counts_once(make_trainer, caplog, twin):
    callback = LayerProbeCallback(every=2)
    other = callback if twin == "the same object" else LayerProbeCallback(every=2)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer = make_trainer(callback, other, **EVALS)
    trainer.train()
    assert steps(trainer, "layerprobe/docs/") == [2, 4] and steps(trainer, "layerprobe/avss/") == [2, 4]
    assert caplog.text.count("was added twice with the same settings; the second one is taken out") == 1


def test_callbacks_for_two_stacks_side_by_side(make_trainer, tmp_path):
    trainer = make_trainer(
        LayerProbeCallback("docs", every=2),
        LayerProbeCallback("docs", every=2, stack="decoder.block"),
        model=tiny_model("t5"),
    )
    trainer.train()
    history = LayerProbeHistory.load(tmp_path / "out")
    assert history["docs/q"].shape == (2, 4, 4) and history["docs/decoder.block/q"].shape == (2, 5, 5)
    assert history.about["docs/decoder.block/q"]["stack"] == "decoder.block"


def test_a_model_replaced_after_construction_is_followed_and_said(make_trainer, caplog):
    trainer = make_trainer(LayerProbeCallback(), **EVALS)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = tiny_model("llama", seed=5)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert [r.getMessage() for r in caplog.records] == [
        "The model was replaced; from now on the new LlamaForCausalLM is watched."
    ]
    assert logged(entries(trainer)[-1]) == pytest.approx(expected(trainer).tolist(), rel=1e-6)


def test_a_model_replaced_by_one_without_layers_is_not_watched(make_trainer, caplog):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 1)

        def forward(self, input_ids, labels=None, **kwargs):
            return {"loss": self.table(input_ids).mean()}

    trainer = make_trainer(LayerProbeCallback(every=2), **EVALS)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = Flat()
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.state.global_step == 4 and not entries(trainer)
    assert "The model was replaced, and the new one is not watched: Flat has no repeated list" in caplog.text


def test_report_to_none_still_has_log_and_history(make_trainer, tmp_path):
    trainer = make_trainer(LayerProbeCallback(), report_to="none", **EVALS)
    trainer.train()
    assert len(entries(trainer)) == 2 and LayerProbeHistory.load(tmp_path / "out").names


def test_the_best_model_does_not_rewrite_the_last_step(make_trainer, tmp_path):
    """An evaluation after training measures the model that was loaded, not that of the last step."""
    saving = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    trainer = make_trainer(LayerProbeCallback(), learning_rate=0.05, **saving, **EVALS)
    trainer.train()
    before = LayerProbeHistory.load(tmp_path / "out").values["avss"]
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.down_proj.weight.mul_(3)
    trainer.evaluate()
    np.testing.assert_array_equal(LayerProbeHistory.load(tmp_path / "out").values["avss"], before)
    assert logged(entries(trainer)[-1]) != pytest.approx(before[-1].tolist(), rel=1e-3)  # the log has both


def test_a_score_that_cannot_be_had_does_not_end_a_training(make_trainer, caplog):
    trainer = make_trainer(LayerProbeCallback(("avss", "influence-mlp")), model=tiny_model("gemma3"), **EVALS)
    trainer.train()
    assert steps(trainer, AVSS[0]) == [2, 4] and "influence-mlp is not logged: influence-mlp asks what" in caplog.text


def test_evaluations_that_are_delayed(make_trainer):
    trainer = make_trainer(LayerProbeCallback(batches="training"), eval_delay=3, **EVALS)
    trainer.train()
    assert steps(trainer, "layerprobe/avss/") == [4]

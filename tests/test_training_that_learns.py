"""The callbacks on a real task: an encoder learns the sentiment of film reviews while it loses layers."""

import numpy as np
from benchmarks.sentiment import accuracies, fine_tune
from transformers import AutoModelForSequenceClassification

from hf_layerprobe import LayerProbeCallback, LayerProbeHistory, ProgressivePruningCallback, PruneOnTrainEndCallback


def test_sentiment_is_learnt_with_fewer_layers(tmp_path):
    progressive = ProgressivePruningCallback({55: 1}, by="influence")
    end = PruneOnTrainEndCallback(num_layers=1, by="influence")
    trainer = fine_tune(
        100,
        LayerProbeCallback(("influence", "drift")),
        progressive,
        end,
        training=800,
        held_out=200,
        output_dir=str(tmp_path),
        batch=8,
        length=32,
        eval_strategy="steps",
        eval_steps=50,
    )
    first, last = accuracies(trainer)
    # 200 reviews, half of them good ones: a standard error of 0.035 around 0.5 for a model that guesses.
    assert last["eval_loss"] < first["eval_loss"] < 0.69 and last["eval_accuracy"] > 0.65
    assert len(trainer.model.bert.encoder.layer) == 5
    assert end.before["accuracy"] == last["eval_accuracy"] and end.after["accuracy"] > 0.55
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned-100")
    assert saved.config.num_hidden_layers == 4
    history = LayerProbeHistory.load(tmp_path)
    (gone,) = progressive.removed[55]
    assert np.isnan(history["influence"][:, gone]).tolist() == [False, True]
    assert end.plan.scores["values"] == np.delete(history["influence"][-1], gone).tolist()
    assert (np.diff(np.delete(history["drift/norm"], gone, axis=1), axis=0) > 0).all()  # it goes on learning

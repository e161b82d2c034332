"""AVSS of each layer as a module of the library `evaluate`; it is loaded by its path, see `hf_layerprobe.metric_path`."""

import datasets
import evaluate

from hf_layerprobe import score_layers
from hf_layerprobe.activations.data import text_rows
from hf_layerprobe.loading import opened

VARIANTS = ("relative", "published", "released")
DESCRIPTION = (
    "How much each layer of a model matters by the variance and sparsity of its activations on the texts (arXiv 2411.02117). "
    "Configuration `relative`, the default, is hf_layerprobe's own definition; `published` and `released` are the paper's and "
    "its authors' code."
)
INPUTS = (
    "predictions: texts to run the model on. model: a model, or a folder or Hub id. tokenizer: the model's, needed where a "
    "model itself is given. Returns `avss/layer_00` and so on."
)


class Avss(evaluate.Measurement):
    def _info(self):
        if self.config_name not in ("default", *VARIANTS):
            raise ValueError(f"avss has the configurations {', '.join(VARIANTS)}; got {self.config_name!r}.")
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="arXiv:2411.02117", inputs_description=INPUTS, features=features
        )

    def add_batch(self, *, predictions=None, **inputs):
        """Refuses one string, which the library takes for a list of its characters."""
        text_rows(predictions)
        super().add_batch(predictions=predictions, **inputs)

    def _compute(self, predictions, model=None, tokenizer=None):
        model, tokenizer = opened(model, tokenizer)
        variant = "relative" if self.config_name == "default" else self.config_name
        scores = score_layers(model, list(predictions), by=f"avss-{variant}", tokenizer=tokenizer)
        return {f"avss/layer_{index:02d}": float(value) for index, value in enumerate(scores.values)}

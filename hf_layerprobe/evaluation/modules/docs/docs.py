"""DOCS of a model's layers as a module of the library `evaluate`; it is loaded by its path, see `hf_layerprobe.metric_path`."""

import datasets
import evaluate
import numpy as np

from hf_layerprobe import docs

DESCRIPTION = (
    "How similar neighbouring layers of a model are, by the weights of each kind of matrix (DOCS, arXiv 2501.16650), and how "
    "much of it is above chance (hf_layerprobe's own definition). The configuration is the axis, `out` (the default) or `in`."
)
INPUTS = (
    "model: a model, or a folder or Hub id with safetensors. predictions: not used; there so that the module combines with "
    "others. Returns `docs/q/mean_neighbour`, `docs/q/mean_neighbour_excess` and so on."
)


class Docs(evaluate.Measurement):
    def _info(self):
        if self.config_name not in ("default", "out", "in"):
            raise ValueError(f"docs has the configurations out and in; got {self.config_name!r}.")
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="arXiv:2501.16650", inputs_description=INPUTS, features=features
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Computes from the model alone, whatever the predictions are; the library cannot compute from no input at all."""
        return super().compute(predictions=[""], references=references, **kwargs)

    def _compute(self, predictions, model=None, tokenizer=None):
        if model is None:
            raise ValueError("Pass model=: a model, or a folder or Hub id with safetensors.")
        found = docs(model, axis="out" if self.config_name == "default" else self.config_name)
        results = {}
        for kind in found.kinds:
            for name, values in (("mean_neighbour", found[kind]), ("mean_neighbour_excess", found.excess(kind))):
                neighbours = np.diagonal(values, offset=1)
                if not np.isnan(neighbours).all():  # layers of that kind that stand apart
                    results[f"docs/{kind}/{name}"] = float(np.nanmean(neighbours))
        return results

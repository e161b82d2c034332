"""Fixtures shared by all tests. No test but those of a loopback Hub may reach for a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import pytest
import torch
from tiny import tiny_model
from training import rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from hf_layerprobe import supported
from hf_layerprobe.embedded import embedded_model, embedded_texts

logging.disable_progress_bar()


def pytest_collection_modifyitems(config, items):
    """Leaves out tests marked `model_type(name)` where the installed Transformers does not have that type yet."""
    here, newest = set(CONFIG_MAPPING), set(supported.read()["types"])
    absent = []
    for item in items:
        names = {marker.args[0] for marker in item.iter_markers("model_type")}
        if names - here - newest:
            raise pytest.UsageError(
                f"{item.nodeid}: no Transformers has the model types {sorted(names - here - newest)}."
            )
        if names - here:
            absent.append(item)
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]


@pytest.fixture(scope="session")
def smollm2():
    """The real 30-layer model; tests must leave it as it is."""
    return AutoModelForCausalLM.from_pretrained(embedded_model()).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="session")
def english():
    """Real English paragraphs."""
    return embedded_texts()


@pytest.fixture
def token_batches():
    """Batches of random ids for the tiny models, right-padded, with masks."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths in ((7, 4), (5, 9), (6, 6)):
        ids = torch.randint(3, 60, (2, max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """A Trainer: 8 rows, batches of 2, so that an epoch has 4 steps."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))

    def build(*callbacks, model=None, evaluation=None, **arguments):
        arguments = dict(max_steps=4, learning_rate=0.0, report_to="none", save_strategy="no") | arguments
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            seed=7,
            **arguments,
        )
        return Trainer(
            model if model is not None else tiny_model("llama"),
            args,
            train_dataset=rows(8, seed=1),
            eval_dataset=rows(5, seed=2, padding=2) if evaluation is None else evaluation,
            callbacks=list(callbacks),
        )

    return build

"""Fixtures shared by all tests. No test but those of a loopback Hub may reach for a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_layerprobe.embedded import embedded_model, embedded_texts

logging.disable_progress_bar()


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

"""What callers may pass as data, and that neither the model nor the tokenizer is changed by it."""

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from test_eavss import PAIRS
from tiny import FAMILIES, TEXT, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from hf_layerprobe import LayerProbeError, avss, eavss, find_stacks, score_layers
from hf_layerprobe.activations import batches, run_pass
from hf_layerprobe.activations.data import text_rows

TEXTS = ["what is it?", "a pear", "an apple a day."]


def framed_tokenizer():
    """One that puts <s> before each text and </s> behind it, as BERT's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def stream(**columns):
    """A streamed data set that does not know its features."""
    return IterableDataset.from_generator(lambda: (dict(zip(columns, row)) for row in zip(*columns.values())))  # noqa: B905


@pytest.mark.parametrize("read", [lambda data: batches(data, tiny_model("llama"), tiny_tokenizer()), text_rows])
@pytest.mark.parametrize(
    "data, message",
    [
        (tf.BatchEncoding({"input_ids": torch.ones(2, 3)}), r"a BatchEncoding with \['input_ids'\].*\[data\]"),
        ({"input_ids": torch.ones(2, 3)}, r"a dict with .*pass a list with one batch"),
        (DatasetDict({"train": Dataset.from_dict({"text": ["x"]})}), r"one split, such as data\['train'\]"),
        (5, "data is a int; expected a list of texts"),
    ],
)
def test_what_is_no_data_set(read, data, message):
    with pytest.raises(LayerProbeError, match=message):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        stream(passage=TEXTS, number=[1, 2, 3]),
        Dataset.from_dict({"passage": TEXTS}, features=Features({"passage": Value("large_string")})),
    ],
    ids=["unknown features", "large_string"],
)
def test_the_only_column_of_texts_is_found(data):
    assert text_rows(data) == TEXTS


def test_a_stream_of_several_texts_is_refused():
    with pytest.raises(LayerProbeError, match=r"columns \['a', 'b'\]"):
        text_rows(stream(a=TEXTS, b=TEXTS))
    assert text_rows(Dataset.from_dict({})) == []


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_tokenised_rows_in_any_format(form):
    rows = {"input_ids": [[3, 4, 5, 0], [6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}
    (batch,) = batches(Dataset.from_dict(rows).with_format(form), tiny_model("llama"))
    assert {name: value.tolist() for name, value in batch.items()} == rows


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_rows_of_text_in_any_format(form):
    data = Dataset.from_dict({"passage": TEXTS, "number": [1, 2, 3]})
    assert text_rows(data.with_format(form)) == text_rows(data.to_iterable_dataset().with_format(form)) == TEXTS
    both = data.add_column("text", ["x"] * 3)
    assert text_rows(both.with_format(form, columns=["passage"])) == TEXTS


def test_what_a_transform_makes_of_the_rows():
    data, tokenizer = Dataset.from_dict({"text": TEXTS}), tiny_tokenizer()
    tokenised = data.with_transform(lambda rows: tokenizer(rows["text"]))
    found, expected = (list(batches(each, tiny_model("llama"), tokenizer, pack=False)) for each in (tokenised, TEXTS))
    assert [b["input_ids"].tolist() for b in found] == [b["input_ids"].tolist() for b in expected]
    assert text_rows(data.with_transform(lambda rows: {"passage": rows["text"]})) == TEXTS


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_batches_of_anything_that_makes_a_tensor(convert):
    ids = [[1, 2, 3], [4, 5, 6]]
    batch = {"input_ids": convert(ids), "attention_mask": [[1, 1, 1], [1, 1, 0]], "name": ["a", "b"], "length": [3, 2]}
    (found,) = batches([batch], tiny_model("llama"))
    assert {name: value.tolist() for name, value in found.items()} == {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
    }
    scores = avss(tiny_model("llama"), [batch])
    assert scores.data["tokens"] == 5 and scores.data["sequences"] == 2


def test_lists_of_numbers_become_float32():
    (batch,) = batches([{"pixel_values": np.ones((1, 3, 16, 16)).tolist()}], tiny_model("vit"))
    assert batch["pixel_values"].dtype == torch.float32
    half = [{"pixel_values": batch["pixel_values"].bfloat16()}]
    assert avss(tiny_model("vit").bfloat16(), half).data["tokens"] == 17  # 16 patches and the class token


def test_ragged_batches_are_refused():
    with pytest.raises(LayerProbeError, match="'input_ids' of a batch is a list that makes no tensor"):
        avss(tiny_model("llama"), [{"input_ids": [[1, 2, 3], [4]]}])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_read_the_texts_too(family):
    model, tokenizer = tiny_model(family), framed_tokenizer()
    for stack in find_stacks(model):
        scores = avss(model, TEXTS, tokenizer=tokenizer, stack=stack, batch_size=2)
        assert scores.data["tokens"] == sum(len(text) + 2 for text in TEXTS)
        rows = [tokenizer(text)["input_ids"] for text in TEXTS]
        one_by_one = [{"input_ids": torch.tensor([row]), "labels": torch.tensor([row])} for row in rows]
        np.testing.assert_allclose(scores.values, avss(model, one_by_one, stack=stack).values, rtol=1e-4)


@pytest.mark.parametrize("model_class", [tf.T5Model, tf.BartModel, tf.T5EncoderModel, tf.BartForSequenceClassification])
def test_texts_for_other_heads(model_class):
    config = FAMILIES["t5" if model_class.__name__.startswith("T5") else "bart"][1]()
    for stack in find_stacks(model := model_class(config).eval()):
        assert np.isfinite(avss(model, TEXTS, tokenizer=framed_tokenizer(), stack=stack).values).all()


@pytest.mark.parametrize("family, needed", [("whisper", "input_features"), ("vit", "pixel_values")])
def test_texts_for_models_of_sounds_and_images(family, needed):
    with pytest.raises(LayerProbeError, match=f"data is texts, and .* needs {needed}"):
        avss(tiny_model(family), TEXTS, tokenizer=tiny_tokenizer())


def test_texts_for_a_model_that_also_needs_images():
    config = tf.BlipConfig(text_config=dict(TEXT), vision_config=dict(TEXT, image_size=16, patch_size=8))
    with torch.device("meta"):
        model = tf.BlipForConditionalGeneration(config)
    with pytest.raises(LayerProbeError, match="needs pixel_values"):
        batches(TEXTS, model, tiny_tokenizer())


@pytest.mark.parametrize("pack", [True, False])
def test_no_sequence_is_longer_than_the_positions(pack):
    model, long = tiny_model("gpt2"), ["a " * 100]
    lengths = [len(b["input_ids"][0]) for b in batches(long, model, tiny_tokenizer(), pack=pack, batch_size=1)]
    assert lengths[0] == 64 and sum(lengths) == (201 if pack else 64)
    assert avss(model, [{"input_ids": list(range(3, 60)) * 2}]).data["tokens"] == 64
    eavss(model, [{**pair, "prompt": "why? " * 30} for pair in PAIRS], tiny_tokenizer())


@pytest.mark.parametrize("family, positions", [("gpt2", 64), ("opt", 64), ("bert", 512)])
def test_batches_with_more_tokens_than_positions(family, positions):
    ids = torch.full((2, positions + 6), 5)
    with pytest.raises(
        LayerProbeError, match=f"Batch 1 has sequences of {positions + 6} tokens, .* {positions} positions"
    ):
        avss(tiny_model(family), [{"input_ids": ids[:, :4]}, {"input_ids": ids}])


def test_positions_that_are_no_limit():
    """Rotary ones, and those that a batch brings along; other failures stay what they are."""
    rotary = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, max_position_embeddings=8)).eval()
    ids = torch.full((1, 70), 5)
    assert avss(rotary, [{"input_ids": ids}]).data["tokens"] == 70
    model = tiny_model("gpt2")
    assert avss(model, [{"input_ids": ids, "position_ids": torch.arange(70)[None] % 35}]).data["tokens"] == 70
    model.transformer.h[0].register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError, match="list index"):
        avss(model, [{"input_ids": ids[:, :4]}])


def test_positions_behind_the_padding_index():
    config = tf.RobertaConfig(**TEXT, max_position_embeddings=40, pad_token_id=1)
    scores = avss(tf.RobertaForMaskedLM(config).eval(), ["a " * 100], tokenizer=tiny_tokenizer())
    assert scores.data["tokens"] == 38


def test_the_tokenizer_is_left_as_it_was():
    model, tokenizer = tiny_model("bert"), framed_tokenizer()
    backend = tokenizer.backend_tokenizer
    for pack in (False, True):
        avss(model, TEXTS, tokenizer=tokenizer, max_length=4, pack=pack)
        assert backend.truncation is None and backend.padding is None
    backend.enable_truncation(7, stride=1)
    backend.enable_padding(length=9, pad_id=0)
    before = backend.truncation, backend.padding
    for pack in (False, True):
        avss(model, TEXTS, tokenizer=tokenizer, max_length=4, pack=pack)
        assert (backend.truncation, backend.padding) == before
    eavss(tiny_model("llama"), PAIRS, tokenizer)
    assert (backend.truncation, backend.padding) == before


def test_texts_that_are_cut_keep_their_frame():
    (batch,) = batches(TEXTS, tiny_model("bert"), framed_tokenizer(), max_length=5)
    assert batch["input_ids"].shape == (3, 5)
    assert batch["input_ids"][:, 0].eq(1).all() and batch["input_ids"][:, -1].eq(2).all()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_empty_texts_add_nothing(family):
    model, tokenizer = tiny_model(family), framed_tokenizer()
    with pytest.raises(LayerProbeError, match="yielded no batch"):
        avss(model, ["", ""], tokenizer=tokenizer)
    with_empty = avss(model, ["", TEXTS[0], "", *TEXTS[1:], ""], tokenizer=tokenizer)
    assert with_empty.data == avss(model, TEXTS, tokenizer=tokenizer).data


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_sizes_that_are_none(name, value):
    with pytest.raises(LayerProbeError, match=f"{name} must be a positive whole number, got {value}"):
        avss(tiny_model("llama"), TEXTS, tokenizer=tiny_tokenizer(), **{name: value})
    if name != "max_tokens":
        with pytest.raises(LayerProbeError, match=name):
            eavss(tiny_model("llama"), PAIRS, tiny_tokenizer(), **{name: value})


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode(fails):
    """A layer frozen in evaluation mode inside a model in training."""
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    if fails:
        model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pass(find_stacks(model)[0], [], [{"input_ids": torch.tensor([[1]])}])
    else:
        avss(model, TEXTS, tokenizer=tiny_tokenizer())
        eavss(model, PAIRS, tiny_tokenizer())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "by, options, message",
    [
        ([], {}, "by= names no score"),
        ("avss", dict(eps=-1), "eps must be positive, got -1"),
        ("avss-released", dict(eps=0), "eps must be positive, got 0"),
        ("avss-published", dict(eps=float("nan")), "eps must be positive"),
        ("avss", dict(bach_size=3), r"avss-relative has no option 'bach_size'\. Did you mean 'batch_size'\?.*: eps"),
        ("avss", dict(relative=False), "avss-relative has no option 'relative'"),
        ("influence", dict(eps=1), "influence has no option 'eps'.*it has none"),
        ("random", dict(sed=3), r"random has no option 'sed'\. Did you mean 'seed'\?"),
        ("docs", dict(kind=["q"]), r"docs has no option 'kind'\. Did you mean 'kinds'\?"),
    ],
)
def test_options_of_scores(by, options, message):
    with pytest.raises(LayerProbeError, match=message):
        score_layers(tiny_model("llama"), TEXTS, by=by, tokenizer=tiny_tokenizer(), **options)


def test_eavss_needs_a_threshold():
    with pytest.raises(LayerProbeError, match="eps must be positive"):
        eavss(tiny_model("llama"), PAIRS, tiny_tokenizer(), eps=0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_layers_without_a_neighbour_to_compare_with():
    """Jamba's attention layers stand apart, so no two neighbours have a q matrix."""
    config = tf.JambaConfig(
        **TEXT, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    with pytest.raises(LayerProbeError, match=r"docs of layers \[0, 1, 2, 3\] .* undefined.*Restrict it less \(kinds="):
        score_layers(tf.JambaForCausalLM(config), by="docs", kinds=["q"])

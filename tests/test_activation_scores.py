"""AVSS in its three variants, and block influence, against their transcriptions; padding, merging, data forms."""

import numpy as np
import oracles
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from torch.utils.data import DataLoader

from hf_layerprobe import LayerProbeError, avss, find_stacks, score_layers
from hf_layerprobe.activations import RunningStatistics

RELATIVE_EPS = 0.05


def recorded(model, batches, stack=None):
    """Every layer's input and output on every batch, by plain hooks: ([layer][batch] inputs, the same outputs)."""
    stack = stack or find_stacks(model)[0]
    inputs, outputs = ([[] for _ in stack.layers] for _ in range(2))
    handles = []
    for i, layer in enumerate(stack.layers):

        def keep(_module, args, kwargs, output, i=i):
            inputs[i].append((args[0] if args else kwargs["hidden_states"]).float().numpy())
            outputs[i].append((output[0] if isinstance(output, tuple) else output).float().numpy())

        handles.append(layer.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def all_scores(model, batches, **options):
    names = ("avss-published", "avss-released", "avss-relative", "influence")
    return {name: scores.values for name, scores in score_layers(model, batches, by=names, **options).items()}


def expected_scores(model, batches, masks, stack=None):
    inputs, outputs = recorded(model, batches, stack)
    return {
        "avss-published": oracles.published(outputs, masks, 1e-5),
        "avss-released": oracles.released(outputs),
        "avss-relative": oracles.relative(inputs, outputs, masks, RELATIVE_EPS),
        "influence": oracles.influence(inputs, outputs, masks),
    }


def assert_same(found, expected, rel=1e-5):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rel, err_msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_smollm2_matches_the_transcription(smollm2, smollm2_tokenizer, english, padded):
    rows = [smollm2_tokenizer(text)["input_ids"][: 64 - 9 * i * padded] for i, text in enumerate(english[:6])]
    length = max(map(len, rows))
    ids = torch.tensor([row + [2] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    assert bool((mask == 0).any()) == padded
    batches = [{"input_ids": ids[i : i + 3], "attention_mask": mask[i : i + 3]} for i in (0, 3)]
    masks = [batch["attention_mask"].numpy() for batch in batches]
    assert_same(all_scores(smollm2, batches), expected_scores(smollm2, batches, masks))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "whisper", "t5", "bart")])
def test_text_families_match_the_transcription(family, token_batches):
    model = tiny_model(family)
    masks = [batch["attention_mask"].numpy() for batch in token_batches]
    assert_same(all_scores(model, token_batches), expected_scores(model, token_batches, masks))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("part", [0, 1])
def test_encoder_and_decoder_use_their_own_mask(family, part, token_batches):
    """T5's layers return tuples. The decoder's padding is that of its own mask, or of the labels."""
    model = tiny_model(family)
    stack = find_stacks(model)[part]
    decoder_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(3))
    explicit = [dict(b, decoder_input_ids=ids, decoder_attention_mask=decoder_mask) for b in token_batches]
    labelled = [dict(b, labels=torch.where(decoder_mask.bool(), ids, -100)) for b in token_batches]
    for batches in (explicit, labelled):
        masks = [(batch["attention_mask"] if part == 0 else decoder_mask).numpy() for batch in batches]
        assert_same(all_scores(model, batches, stack=stack), expected_scores(model, batches, masks, stack))


@pytest.mark.parametrize("family", ["vit", "whisper"])
def test_images_and_audio(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        batches = [{"pixel_values": torch.rand(2, 3, 16, 16, generator=generator)} for _ in range(2)]
    else:
        ids = torch.randint(3, 60, (2, 5), generator=generator)
        batches = [
            {"input_features": torch.rand(2, 16, 48, generator=generator), "decoder_input_ids": ids} for _ in range(2)
        ]
    for stack in find_stacks(model):
        inputs, _ = recorded(model, batches, stack)
        masks = [np.ones(x.shape[:2]) for x in inputs[0]]
        assert_same(all_scores(model, batches, stack=stack), expected_scores(model, batches, masks, stack))


def test_padding_does_not_count_whatever_it_holds(token_batches):
    model = tiny_model("llama")
    filled = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 61)} for b in token_batches]
    one, other = all_scores(model, token_batches), all_scores(model, filled)
    for name in ("avss-published", "avss-relative", "influence"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
    assert not np.allclose(one["avss-released"], other["avss-released"], rtol=1e-6)  # the authors' code counts it


def test_batching_and_order_do_not_matter(token_batches):
    model = tiny_model("llama")
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in token_batches for i in range(2)]
    one, other = all_scores(model, token_batches), all_scores(model, rows[::-1])
    for name in ("avss-published", "avss-relative", "influence"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


def test_no_value_below_eps_does_not_divide_by_zero(token_batches):
    scores = avss(tiny_model("llama"), token_batches, variant="published", eps=1e-30)
    assert np.isfinite(scores.values).all()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in token_batches)
    np.testing.assert_allclose(scores.details["sparsity"], 1 / (tokens * 32))


@pytest.mark.parametrize("variant", ["published", "released"])
def test_a_papers_score_varied_is_not_the_papers(variant, token_batches):
    model, sites = tiny_model("llama"), ("layer", "mlp-inner") if variant == "published" else ("layer",)
    for site in sites:
        for eps in (None, 1e-5, 0.1):
            found = avss(model, token_batches, variant=variant, site=site, eps=eps)
            assert found.source.startswith("our own definition, after AVSS") == (site != "layer" or eps == 0.1)
            assert "2411.02117" in found.source


@pytest.mark.parametrize("name, paper", [("cka", "1905.00414"), ("lid", "2402.18048")])
def test_importance_that_no_paper_makes_of_a_measure_is_ours(name, paper, token_batches):
    source = score_layers(tiny_model("llama"), token_batches, by=name).source
    assert source.startswith("our own definition, after") and paper in source


def test_results_say_what_they_are(token_batches):
    model = tiny_model("llama")
    relative, published = avss(model, token_batches), avss(model, token_batches, variant="published")
    assert relative.name == "avss-relative" and relative.source == "our own definition"
    assert published.name == "avss-published" and "2411.02117" in published.source
    assert relative.details["normalised"].sum() == pytest.approx(1)
    assert relative.details["cumulative"][-1] == pytest.approx(1)
    assert relative.data["tokens"] == 37 and relative.data["sequences"] == 6
    assert relative.data["fingerprint"] == published.data["fingerprint"]
    assert relative.data["fingerprint"] != avss(model, token_batches[:1]).data["fingerprint"]
    assert relative.higher_is_more_important and len(relative) == 4
    assert relative.least_important(2) == sorted(np.argsort(relative.values)[:2].tolist())


def test_the_model_is_left_as_it_was(token_batches):
    model = tiny_model("llama").train()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    avss(model, token_batches)
    assert model.training and hooks() == before
    with pytest.raises(ValueError, match="exactly one"):
        avss(model, [{"input_ids": torch.tensor([[3]]), "inputs_embeds": torch.ones(1, 1, 32)}])
    assert model.training and hooks() == before


def test_every_form_of_data_gives_the_same(smollm2, smollm2_tokenizer, english):
    from transformers import LlamaForCausalLM

    config = FAMILIES["llama"][1]()
    config.vocab_size = len(smollm2_tokenizer)
    model = LlamaForCausalLM(config).eval()
    texts = english[:5]
    rows = [smollm2_tokenizer(text, truncation=True, max_length=32) for text in texts]
    options = dict(tokenizer=smollm2_tokenizer, max_length=32, batch_size=2, pack=False)
    expected = avss(model, texts, **options).values
    dataset = Dataset.from_dict({"passage": texts, "number": range(5)})
    tokenised = Dataset.from_list([dict(row) for row in rows])

    def generate():
        yield from ({"text": text} for text in texts)

    def collate(group):
        return smollm2_tokenizer.pad(group, return_tensors="pt")

    for data in (
        dataset,
        dataset.rename_column("passage", "text"),
        IterableDataset.from_generator(generate),
        tokenised,
        tokenised.with_format("torch"),
        DataLoader([dict(row) for row in rows], batch_size=2, collate_fn=collate),
        (text for text in texts),
    ):
        np.testing.assert_allclose(avss(model, data, **options).values, expected, rtol=1e-5)


def test_packing_fills_sequences_and_drops_no_token(smollm2_tokenizer, english):
    from hf_layerprobe.activations import batches

    texts = english[:7]
    packed = list(batches(texts, tiny_model("llama"), smollm2_tokenizer, max_length=50))
    ids = [token for batch in packed for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
           for token in row[mask.bool()].tolist()]  # fmt: skip
    expected = [t for text in texts for t in [*smollm2_tokenizer(text)["input_ids"], smollm2_tokenizer.eos_token_id]]
    assert ids == expected
    assert all(batch["attention_mask"].all() for batch in packed[:-1])


def test_max_tokens_stops_early(token_batches):
    assert avss(tiny_model("llama"), token_batches, max_tokens=12).data["tokens"] == 25  # whole batches: 11, then 14


class FakeTokenizer:
    eos_token_id = 2
    pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 60 for c in text]}


@pytest.mark.parametrize(
    "data, tokenizer, message",
    [
        (None, None, "data is needed"),
        ([], None, "data set is empty"),
        (["", ""], FakeTokenizer(), "yielded no batch"),
        ("a text", FakeTokenizer(), "one string"),
        (["a text"], None, "tokenizer is needed"),
        ([1, 2], None, "data yields int"),
        (["a", 1], FakeTokenizer(), "mixes texts with int"),
        (Dataset.from_dict({"a": ["x"], "b": ["y"]}), FakeTokenizer(), r"columns \['a', 'b'\]"),
    ],
)
def test_unusable_data(data, tokenizer, message):
    with pytest.raises(LayerProbeError, match=message):
        avss(tiny_model("bert"), data, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="enhanced"), "Unknown AVSS variant 'enhanced'; the variants are published, released, relative"),
        (dict(site="mpl"), "not at 'mpl'. Did you mean 'mlp'"),
        (dict(eps=0), "eps must be positive"),
    ],
)
def test_unusable_options(options, message, token_batches):
    with pytest.raises(LayerProbeError, match=message):
        avss(tiny_model("llama"), token_batches, **options)


def test_unknown_score_suggests_the_nearest(token_batches):
    with pytest.raises(LayerProbeError, match=r"Unknown score 'influense'\. Did you mean 'influence'"):
        score_layers(tiny_model("llama"), token_batches, by="influense")
    with pytest.raises(LayerProbeError, match="belong to one score"):
        score_layers(tiny_model("llama"), token_batches, by=["avss", "influence"], eps=0.1)


def test_nan_weights_are_found_at_their_layer(token_batches):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LayerProbeError, match=r"layers \[2, 3\] .* not finite"):
        avss(model, token_batches, variant="published")


def test_weights_on_the_meta_device(token_batches):
    with torch.device("meta"):
        model = FAMILIES["llama"][0](FAMILIES["llama"][1]())
    with pytest.raises(LayerProbeError, match="meta device"):
        avss(model, token_batches)


def test_half_precision(token_batches):
    model = tiny_model("llama")
    exact = all_scores(model, token_batches)
    rough = all_scores(model.to(torch.bfloat16), token_batches)
    np.testing.assert_allclose(rough["influence"], exact["influence"], rtol=0.05)
    np.testing.assert_allclose(rough["avss-relative"], exact["avss-relative"], rtol=0.3)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_statistics_merge_exactly(sizes, offset, seed):
    """Any split of the rows, by updates or by merging, gives the statistics of all of them; a large mean costs nothing."""
    generator = np.random.default_rng(seed)
    parts = [generator.normal(offset, 1, (size, 50)) for size in sizes]

    def feed(statistics, part):
        rows = torch.tensor(part)
        small = (rows.abs() < 0.5).sum(-1)
        weight = torch.full((len(part),), 50)
        statistics.update(0, rows.mean(-1), rows.var(-1, correction=0), small, weight)

    one, merged = RunningStatistics(1), RunningStatistics(1)
    for part in parts:
        feed(one, part)
        other = RunningStatistics(1)
        feed(other, part)
        copy = RunningStatistics(1)
        copy.load_state_dict(other.state_dict())
        merged.merge(copy)
    together = np.concatenate(parts)
    for found in (one, merged):
        assert found.variance().item() == pytest.approx(together.var(), rel=1e-7)
        assert found.share_small().item() == pytest.approx(max((np.abs(together) < 0.5).mean(), 1 / together.size))

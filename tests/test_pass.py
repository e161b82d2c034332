"""The pass itself: what waits for the device, resuming and adding up, processes, recomputed and compiled layers, bad input."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_masks import Blocks, lengths_mask
from tiny import GQA, TEXT, redrawn, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_layerprobe import LayerProbeError, avss, find_stacks, score_layers
from hf_layerprobe.activations import LayerStream
from hf_layerprobe.activations.checks import FiniteOutputs
from hf_layerprobe.scores.batch_loss import BatchLoss
from hf_layerprobe.scores.registry import SCORES
from hf_layerprobe.stacks import LayerStack

STREAMED = [name for name, score in SCORES.items() if score.streams]
# Scores whose numbers are sums over tokens or sequences; the others read a random sample of tokens.
SUMMED = [name for name in STREAMED if name not in ("cka", "stable-rank", "lid")]
SHAREABLE = [*SUMMED, "taylor", "bypass"]
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "bincount",
    "is_nonzero",
    "item",
)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the values of a tensor, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(waiting in name for waiting in WAITING), f"{name} waits for the device"
        indices = args[1] if "aten.index." in name else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} by a mask waits"
        assert (kwargs or {}).get("device") is None or "_to_copy" not in name, f"{name} moves between devices"
        return func(*args, **(kwargs or {}))


class Strict:
    """An accumulator that may not wait."""

    def __init__(self, inner):
        self.inner = inner
        self.sites = getattr(inner, "sites", ())

    def update(self, *args, **sites):
        with NoWaiting():
            self.inner.update(*args, **sites)


@pytest.mark.parametrize("name", STREAMED)
def test_nothing_waits_for_the_device(name, token_batches):
    model = tiny_model("llama")
    stack = find_stacks(model)[0]
    strict, free = Strict(SCORES[name].make(4)), SCORES[name].make(4)
    with LayerStream(stack, [strict, free]), torch.no_grad():
        for batch in token_batches:
            model(**batch)
    read = SCORES[name].read
    np.testing.assert_array_equal(read(strict.inner)[0], read(free)[0])


@pytest.mark.parametrize("name", [name for name in STREAMED if not name.startswith("influence-")])
def test_no_branch_depends_on_values(name):
    """A meta tensor has no values: reading one, copying it to the host or a shape that depends on it is an error."""
    model, accumulator = Blocks(devices=("meta", "meta")), SCORES[name].make(2)
    with LayerStream(LayerStack(model, "layers"), [accumulator]), torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 6, dtype=torch.long, device="meta"), lengths_mask([6, 3], 6).to("meta"))


def filled(name, batches, accumulator=None):
    model = tiny_model("llama")
    accumulator = accumulator or SCORES[name].make(4)
    with LayerStream(find_stacks(model)[0], [accumulator]), torch.no_grad():
        for batch in batches:
            model(**batch)
    return accumulator


@pytest.mark.parametrize("name", STREAMED)
def test_stop_resume_and_merge(name, token_batches):
    read = SCORES[name].read
    expected = read(filled(name, token_batches))[0]
    resumed = SCORES[name].make(4)
    resumed.load_state_dict(copy.deepcopy(filled(name, token_batches[:1]).state_dict()))
    np.testing.assert_allclose(read(filled(name, token_batches[1:], resumed))[0], expected, rtol=1e-6)
    merged = filled(name, token_batches[:2])
    merged.merge(filled(name, token_batches[2:]))
    merged.merge(SCORES[name].make(4))
    np.testing.assert_allclose(read(merged)[0], expected, rtol=1e-6)
    assert all(isinstance(value, torch.Tensor) and not value.is_cuda for value in merged.state_dict().values())


SHARED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from test_pass import SHAREABLE, loader_of
from tiny import GQA, TEXT, redrawn, tiny_model
from hf_layerprobe import score_layers
accelerator = Accelerator(cpu=True)
for rows in (8, 7):
    loader = accelerator.prepare(loader_of(rows))
    found = score_layers(tiny_model("llama"), loader, by=SHAREABLE)
    json.dump(
        {"data": found["influence"].data, "values": {name: scores.values.tolist() for name, scores in found.items()}},
        open(f"{sys.argv[2]}/{accelerator.process_index}-{rows}.json", "w"),
    )
accelerator.end_training()
"""


def loader_of(rows):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (9,), generator=generator) for _ in range(rows)]
    masks = lengths_mask([9 - i % 4 for i in range(rows)], 9)
    data = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]
    return torch.utils.data.DataLoader(data, batch_size=2)


def test_two_processes_equal_one(tmp_path):
    """Also with 7 rows, of which `accelerate` repeats one."""
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29592"]
    tests = Path(__file__).parent
    subprocess.run([*command, tmp_path / "run.py", tests, tmp_path], check=True, timeout=300, capture_output=True)
    for rows in (8, 7):
        alone = score_layers(tiny_model("llama"), loader_of(rows), by=[n for n in SHAREABLE if n != "avss-released"])
        found = [json.loads((tmp_path / f"{rank}-{rows}.json").read_text()) for rank in (0, 1)]
        assert found[0] == found[1]
        for name, scores in alone.items():
            np.testing.assert_allclose(found[0]["values"][name], scores.values, rtol=1e-6, err_msg=name)
        assert {k: found[0]["data"][k] for k in ("tokens", "sequences")} == {
            k: alone["influence"].data[k] for k in ("tokens", "sequences")
        }


def test_recomputed_layers_count_once(token_batches):
    model = tiny_model("llama").train()
    expected = filled("influence", token_batches)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = SCORES["influence"].make(4)
    with LayerStream(find_stacks(model)[0], [found]):
        for batch in token_batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert model.model.layers[0].gradient_checkpointing and model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert found.turns.state_dict()["tokens"].tolist() == [37] * 4
    np.testing.assert_allclose(found.compute()[0], expected.compute()[0], rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "never"])
def test_compiled_models_count_once(when, token_batches):
    """Compiled graphs know no hooks that come later."""
    expected = score_layers(tiny_model("llama"), token_batches, by="influence")
    model = torch.compile(tiny_model("llama"), backend="eager")
    if when == "before":
        with torch.no_grad():
            model(**token_batches[0], use_cache=False)
    found = score_layers(model, token_batches, by="influence")
    assert found.data["tokens"] == 37
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 1000),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=25)
def test_batches_order_and_padding_do_not_matter(lengths, dtype, seed, padding):
    """The same tokens, one sequence at a time in another order and with more padding, which holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    before, update = torch.randn(2, len(lengths), 9, 48, generator=generator).to(dtype).unbind(0)
    before[0, 0, 5] = 300  # a massive activation
    after = before + update / 3
    mask = lengths_mask(lengths, 9).bool()
    names = [name for name in SUMMED if name != "avss-released" and not getattr(SCORES[name].make(1), "sites", ())]
    whole, parts = ({name: SCORES[name].make(1) for name in names} for _ in range(2))
    for name in names:
        whole[name].update(0, before, after, mask)
        for i in reversed(range(len(lengths))):
            more = torch.full((1, padding, 48), torch.nan, dtype=dtype)
            row = mask[i : i + 1]
            longer = torch.cat([row, row.new_zeros(1, padding)], 1)
            parts[name].update(0, *(torch.cat([x[i : i + 1], more], 1) for x in (before, after)), longer)
        one, other = (SCORES[name].read(each[name]) for each in (whole, parts))
        np.testing.assert_allclose(other[0], one[0], rtol=1e-6, err_msg=name)
        for key in one[1]:
            np.testing.assert_allclose(other[1][key], one[1][key], rtol=1e-6, err_msg=f"{name} {key}")
    x, y = (values.double()[mask].numpy() for values in (before, after))
    v = (y - x) / np.sqrt((x**2).mean(-1, keepdims=True))
    details = whole["avss-relative"].compute()[1]
    np.testing.assert_allclose(details["variance"], v.var(), rtol=1e-6)
    np.testing.assert_allclose(details["sparsity"], max((np.abs(v) < 0.05).mean(), 1 / v.size), rtol=1e-12)
    details = whole["avss-published"].compute()[1]
    np.testing.assert_allclose(details["variance"], y.var(), rtol=1e-9)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(whole["influence"].compute()[0], 1 - cosines.mean(), rtol=1e-5, atol=1e-9)


def test_one_logit_a_sequence_is_made(token_batches):
    """Nobody reads them; with labels, the model's own loss does."""
    model = tiny_model("llama")
    made = []
    model.lm_head.register_forward_hook(lambda _m, _a, logits: made.append(logits.shape[1]))
    expected = score_layers(model, [{**batch, "labels": batch["input_ids"]} for batch in token_batches], by="avss")
    assert made == [batch["input_ids"].shape[1] for batch in token_batches]
    made.clear()
    assert score_layers(model, token_batches, by="avss").values.tolist() == expected.values.tolist()
    assert made == [1, 1, 1]


def test_a_classifier_gets_all_that_it_looks_through(token_batches):
    """BioGPT's takes the number of logits, and then looks for the last token among what is left."""
    config = tf.BioGptConfig(**TEXT, max_position_embeddings=64, num_labels=2, pad_token_id=0)
    model = redrawn(tf.BioGptForSequenceClassification(config))
    assert len(score_layers(model, token_batches, by="avss").values) == 4


@pytest.mark.model_type("gemma4_text")
def test_every_token_reaches_layers_that_share_keys(token_batches):
    """Told a number of logits, Gemma 4 takes only so many tokens through the last of its layers."""
    config = tf.Gemma4TextConfig(
        **GQA, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=64,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = redrawn(tf.Gemma4ForCausalLM(config))
    tokens = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, i=index: tokens.setdefault(i, []).append(out.shape[1]))
    score_layers(model, token_batches, by="avss")
    assert [tokens[i] for i in range(4)] == [[batch["input_ids"].shape[1] for batch in token_batches]] * 4


def test_a_large_mean_costs_no_precision():
    """Mean 1000, deviation 1: float32 sums of squares would leave two digits."""
    after = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0)) + 1000
    found = SCORES["avss-published"].make(1)
    found.update(0, after, after, None)
    np.testing.assert_allclose(found.compute()[1]["variance"], after.double().var(correction=0), rtol=1e-9)


def test_a_share_without_rows_keeps_nobody_waiting(tmp_path):
    """Two rows are one batch: the second process only repeats it."""
    (tmp_path / "run.py").write_text(SHARED.replace("(8, 7)", "(2,)"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29593"]
    tests = Path(__file__).parent
    subprocess.run([*command, tmp_path / "run.py", tests, tmp_path], check=True, timeout=120, capture_output=True)
    found = [json.loads((tmp_path / f"{rank}-2.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and found[0]["data"]["sequences"] == 2


def test_padding_alone_is_refused(token_batches):
    batch = {**token_batches[0], "attention_mask": torch.zeros_like(token_batches[0]["attention_mask"])}
    with pytest.raises(LayerProbeError, match="Every token of the 2 sequences is padding"):
        avss(tiny_model("llama"), [batch])


@pytest.mark.parametrize("wrong", [64, 50_000, -1])
def test_a_tokenizer_that_does_not_fit(wrong, token_batches):
    bad = {"input_ids": torch.tensor([[3, wrong, 4]])}
    with pytest.raises(LayerProbeError, match=f"Batch 1 has the token id {wrong}, .* knows ids 0 to 63"):
        avss(tiny_model("llama"), [token_batches[0], bad])


def test_nan_activations_are_named_by_layer_and_batch(token_batches):
    """One token's embedding is not finite; it stands in the second batch only."""
    model = tiny_model("llama")
    token = next(i for i in range(3, 60) if (token_batches[1]["input_ids"] == i).any()
                 and not any((token_batches[j]["input_ids"] == i).any() for j in (0, 2)))  # fmt: skip
    model.model.embed_tokens.weight.data[token] = torch.inf
    message = r"layers \[0, 1, 2, 3\] \(model.layers\) are not finite: .* first that of layer 0 on batch 1 "
    with pytest.raises(LayerProbeError, match=message):
        avss(model, token_batches)
    finite = FiniteOutputs(1)
    states = torch.tensor([[[1.0], [torch.nan]]])
    finite.update(0, states, states, torch.tensor([[True, False]]))  # padding may hold anything
    finite.check("layers")


def test_a_model_in_training_mode_is_told_and_put_back(token_batches, caplog):
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    with caplog.at_level("WARNING", "hf_layerprobe"):
        avss(model, token_batches)
    assert "LlamaForCausalLM is in training mode; it is measured in evaluation mode and put back" in caplog.text
    assert model.training and not model.model.layers[1].training
    caplog.clear()
    avss(model.eval(), token_batches)
    assert "training mode" not in caplog.text


def test_data_that_end_early(token_batches):
    """What there was is measured and counted; what breaks off leaves the model as it was."""
    model = tiny_model("llama").train()

    def breaks_off():
        yield token_batches[0]
        raise OSError("disk gone")

    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    with pytest.raises(OSError, match="disk gone"):
        avss(model, breaks_off())
    assert model.training and hooks() == before
    early = avss(model, (batch for batch in token_batches[:1]), max_tokens=1000)
    assert early.data["tokens"] == 11


def exact_share(values):
    squares = np.sort(values.astype(float).ravel() ** 2)[::-1]
    return squares[: max(1, round(0.001 * squares.size))].sum() / squares.sum()


@pytest.mark.parametrize("massive", [0, 30, 3000])
def test_the_share_of_the_largest_values_is_between_its_bounds(massive):
    before, update = torch.randn(2, 6, 40, 96, generator=torch.Generator().manual_seed(massive)).unbind(0)
    update[:, 0, 17] += massive
    update[2, 7, 3] -= massive
    after = before + update
    mask = lengths_mask([40, 40, 31, 40, 5, 40], 40).bool()
    relative, published = SCORES["avss-relative"].make(1), SCORES["avss-published"].make(1)
    for accumulator in (relative, published):
        accumulator.update(0, before, after, mask)
    v = (update / before.square().mean(-1, keepdim=True).sqrt())[mask].numpy()
    for accumulator, values in ((relative, v), (published, after[mask].numpy())):
        details, exact = accumulator.compute()[1], exact_share(values)
        low, high = (details[f"largest_share_at_{end}"].item() for end in ("least", "most"))
        assert low <= exact * (1 + 1e-6) and exact <= high * (1 + 1e-6)
        if massive == 3000:
            assert 0.99 < low <= high <= 1
        if not massive:
            assert high < 0.1


def test_massive_activations_are_noted_and_can_be_limited(token_batches):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[5] *= 300
    plain, robust = avss(model, token_batches), avss(model, token_batches, robust=True)
    assert plain.details["largest_share_at_least"][1] < 0.5 and not plain.notes  # a whole channel: more than 0.1 %
    before, after = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    after[0, 0, 3] = 500
    assert robust.name == "avss-robust" and robust.source == "our own definition"
    found = SCORES["avss-robust"].make(1)
    found.update(0, before, after, None)
    v = ((after - before) / before.square().mean(-1, keepdim=True).sqrt()).double().numpy()
    limited = np.clip(v, -3, 3)
    details = found.compute()[1]
    np.testing.assert_allclose(details["variance"], limited.var(), rtol=1e-6)
    np.testing.assert_allclose(details["clipped_share"], 1 - (limited**2).sum() / (v**2).sum(), rtol=1e-6)
    with pytest.raises(LayerProbeError, match="one of the relative variant"):
        avss(model, token_batches, robust=True, variant="published")
    with pytest.raises(LayerProbeError, match="clip must be positive"):
        avss(model, token_batches, robust=True, clip=0)


def test_the_first_token_of_smollm2_is_seen(smollm2, smollm2_tokenizer, english):
    found = avss(smollm2, english[:2], variant="published", tokenizer=smollm2_tokenizer, max_tokens=128)
    swamped = found.details["largest_share_at_least"] > 0.5
    assert swamped.sum() > 10 and "the largest 0.1 % of the values hold at least half" in found.notes[0]
    assert str(np.flatnonzero(swamped)[-1]) in found.notes[0] and found.to_dict()["notes"] == list(found.notes)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_padding_of_a_seq2seq_collator(family):
    """Labels and shifted labels, and no mask of the decoder."""
    model = tiny_model(family)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, length in enumerate((9, 2, 1)):
        labels[row, length:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    shifted = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    path = "decoder.block" if family == "t5" else "model.decoder.layers"
    one, two = (score_layers(model, [each], by="influence", stack=path) for each in (batch, shifted))
    assert one.data["tokens"] == two.data["tokens"] == 12
    np.testing.assert_allclose(one.values, two.values, rtol=1e-5)


def test_masks_of_four_dimensions():
    model = tiny_model("llama")
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    seen = torch.ones(6, 6).tril().bool()[None, None] & mask[:, None, None].bool()
    added = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = score_layers(model, [{"input_ids": ids, "attention_mask": mask}], by="influence")
    for each in (seen, added):
        found = score_layers(model, [{"input_ids": ids, "attention_mask": each}], by="influence")
        assert found.data["tokens"] == 9
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)


@pytest.mark.parametrize("tokens", [7, 3])
def test_layers_that_have_tokens_first(tokens):
    """XLNet's: batched or row by row, padded or not."""
    config = tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=3, n_head=4, d_inner=48)
    model = redrawn(tf.XLNetLMHeadModel(config))
    ids = torch.randint(3, 60, (3, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    whole = score_layers(model, [{"input_ids": ids, "attention_mask": mask}], by=["angular", "influence"])
    rows = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)]
    for name, scores in score_layers(model, rows, by=["angular", "influence"]).items():
        np.testing.assert_allclose(scores.values, whole[name].values, rtol=1e-4)
    mask[1, :2] = 0  # on the left, as XLNet pads
    padded = score_layers(model, [{"input_ids": ids, "attention_mask": mask}], by="influence")
    assert padded.data["tokens"] == mask.sum()


@pytest.mark.parametrize("family", ["xlm", "bart decoder", "llama"])
def test_labels_that_a_model_does_not_shift(family):
    if family == "xlm":
        model = redrawn(tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=64, emb_dim=32, n_layers=4, n_heads=4)))
    elif family == "llama":
        model = tiny_model("llama")
    else:
        small = dict(d_model=32, decoder_layers=4, decoder_ffn_dim=48, decoder_attention_heads=4, vocab_size=64)
        model = redrawn(tf.BartForCausalLM(tf.BartConfig(**small, max_position_embeddings=64)))
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ::3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    total, number = BatchLoss(model)(batch)
    with torch.no_grad():
        assert total.item() / number.item() == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_columns_of_rows_that_are_not_read(caplog):
    with caplog.at_level("WARNING", "hf_layerprobe"):
        avss(tiny_model("bert"), [{"input_ids": [3, 4, 5], "token_type_ids": [0, 1, 1], "text": "x"}])
    assert "input_ids are read alone, and token_type_ids left out" in caplog.text

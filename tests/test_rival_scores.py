"""The rivals of AVSS against their transcriptions, and what they do to the model: nothing."""

import gc

import index_oracles
import numpy as np
import oracles
import pytest
import torch
import transformers as tf
from test_activation_scores import recorded
from test_prune_composites import qwen3_vl, qwen_inputs
from test_sites import model_and_batches
from tiny import TEXT, redrawn, tiny_model

from hf_layerprobe import LayerProbeError, find_stacks, plan_pruning, score_layers
from hf_layerprobe.activations import TokenSample, run_pass

EVERYTHING = (
    "avss",
    "influence",
    "influence-mlp",
    "influence-attention",
    "angular",
    "update-norm",
    "cka",
    "stable-rank",
    "lid",
    "taylor",
    "bypass",
)


def states_of(model, batches, stack=None):
    """x_0 to x_L of every batch."""
    inputs, outputs = recorded(model, batches, stack)
    return [*inputs, outputs[-1]]


def masks_of(batches):
    return [batch["attention_mask"].numpy() for batch in batches]


def mean_loss(model, batches):
    """Mean next-token loss over all tokens, from probabilities."""
    logs = []
    for batch in batches:
        logits = model(**batch).logits.double()
        for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
            n = int(mask.sum())
            logs.append(torch.log_softmax(row[: n - 1], -1)[torch.arange(n - 1), ids[1:n]])
    return -torch.cat(logs).mean()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scores_of_the_stream(family, token_batches):
    model, masks = tiny_model(family), masks_of(token_batches)
    names = ("angular", "update-norm", "stable-rank", "lid", "cka")
    found = score_layers(model, token_batches, by=names)
    inputs, outputs = recorded(model, token_batches)
    states = [*inputs, outputs[-1]]
    distances = oracles.angular(states, masks)
    np.testing.assert_allclose(found["angular"].details["distances"], distances, rtol=1e-5, atol=2e-8)
    np.testing.assert_allclose(found["angular"].values, np.diagonal(distances, offset=1), rtol=1e-5)
    np.testing.assert_allclose(found["update-norm"].values, oracles.update_norm(inputs, outputs, masks), rtol=1e-6)
    points = [oracles.counted(batches, masks) for batches in states]
    ranks, entropies = zip(*map(oracles.stable_rank, points[1:]), strict=True)
    np.testing.assert_allclose(found["stable-rank"].values, ranks, rtol=1e-6)
    np.testing.assert_allclose(found["stable-rank"].details["entropy"], entropies, rtol=1e-6)
    dimensions = [oracles.local_intrinsic_dimension(x) for x in points[1:]]
    np.testing.assert_allclose(found["lid"].values, dimensions, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon", "falcon, new architecture"])
def test_sublayers(family, token_batches):
    model, masks = model_and_batches(family, token_batches)[0], masks_of(token_batches)
    layers = find_stacks(model)[0].layers
    recordings = {"attention": [[] for _ in layers], "mlp": [[] for _ in layers]}
    handles = []
    for i, layer in enumerate(layers):
        for site, module in zip(
            recordings, [m for n, m in layer.named_children() if "norm" not in n and "ln" not in n], strict=True
        ):
            keep = recordings[site][i].append
            handles.append(
                module.register_forward_hook(
                    lambda _m, _a, out, keep=keep: keep((out[0] if isinstance(out, tuple) else out).numpy().copy())
                )
            )
    inputs, _ = recorded(model, token_batches)
    for handle in handles:
        handle.remove()
    found = score_layers(model, token_batches, by=["influence-attention", "influence-mlp"])
    attention = oracles.sublayer_influence(inputs, recordings["attention"], masks)
    np.testing.assert_allclose(found["influence-attention"].values, attention, rtol=1e-5)
    between = [
        [x + a for x, a in zip(*pair, strict=True)] for pair in zip(inputs, recordings["attention"], strict=True)
    ]
    # Mixtral's experts turn the stream by 5e-4 here, 1 - cos = 1e-7; its rounding, 6e-8, moves that by 3e-11.
    mlp = oracles.sublayer_influence(between, recordings["mlp"], masks)
    np.testing.assert_allclose(found["influence-mlp"].values, mlp, rtol=1e-5, atol=3e-11)
    rough = score_layers(model.bfloat16(), token_batches, by="influence-mlp")
    np.testing.assert_allclose(rough.values, found["influence-mlp"].values, rtol=0.1)


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_sublayers_whose_outputs_are_not_what_is_added(family, token_batches):
    with pytest.raises(LayerProbeError, match=r"layers \[0, 1, 2, 3\] add something else .* a norm or a scale follows"):
        score_layers(tiny_model(family), token_batches, by="influence-mlp")


def test_alignment_of_layers():
    model = tiny_model("llama")
    batches = [{"input_ids": torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))}]
    points = [oracles.counted(x, [np.ones((2, 6))]) for x in states_of(model, batches)]
    expected = [[index_oracles.cka_debiased(x, y) for y in points] for x in points]
    found = score_layers(model, batches, by="cka")
    np.testing.assert_allclose(found.details["map"], expected, rtol=1e-6)
    np.testing.assert_allclose(found.values, np.diagonal(expected, offset=1), rtol=1e-6)
    assert not found.higher_is_more_important


def test_a_score_of_blocks_names_the_closest_block(token_batches):
    model = tiny_model("llama", 5)
    with torch.no_grad():  # layers 0 and 3 alone hardly do anything
        for layer in (model.model.layers[i] for i in (0, 3)):
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(0.02)
    scores = score_layers(model, token_batches, by="angular")
    assert set(np.argsort(scores.values)[:2]) == {0, 3}
    for number in (1, 2, 3):
        start = min(range(5 - number), key=lambda i: scores.details["distances"][i, i + number])
        block = tuple(range(start, start + number))
        plan = plan_pruning(model, token_batches, num_layers=number, by="angular")
        assert plan.remove == tuple(scores.least_important(number)) == block and plan.note == ""


def left_out(_layer, args, output):
    """A hook that hands on what came in; some layers return a tuple."""
    return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_bypass_is_the_loss_without_the_layer(family, token_batches):
    """A layer that hands its input on, against the whole model run each time and against losses from probabilities."""
    model = tiny_model(family)
    found = score_layers(model, token_batches, by="bypass")
    whole = score_layers(model, token_batches, by="bypass", prefix=False)
    np.testing.assert_array_equal(found.values, whole.values)
    layers = find_stacks(model)[0].layers
    with torch.no_grad():
        dense = mean_loss(model, token_batches).item()
        for i in range(len(layers)):
            handle = layers[i].register_forward_hook(left_out)
            without = mean_loss(model, token_batches).item()
            handle.remove()
            assert found.values[i] == pytest.approx(without - dense, abs=1e-5)
            assert found.details["loss"][i] == pytest.approx(without, abs=1e-5)


def test_bypass_runs_only_the_layers_behind():
    model = tiny_model("llama")
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    rows = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    score_layers(model, [{"input_ids": rows[:1]}], by="bypass")
    first = len(ran)
    score_layers(model, [{"input_ids": rows[:1]}, {"input_ids": rows[1:]}], by="bypass")
    # The pass, the loss of the dense model, and 4 + 3 + 2 + 1 layers instead of 4 × 4.
    assert len(ran) - 2 * first == 4 + 4 + 10


@pytest.mark.model_type("gemma4")
def test_layers_that_read_more_than_their_input():
    """The last layers of Gemma 4 use keys and values of earlier ones, which a skipped layer does not leave."""
    config = tf.Gemma4TextConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, sliding_window=4,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = redrawn(tf.Gemma4ForCausalLM(config))
    batches = [{"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))}]
    found, whole = (score_layers(model, batches, by="bypass", prefix=prefix).values for prefix in (True, False))
    np.testing.assert_array_equal(found, whole)
    assert np.abs(found).min() > 1e-4


@pytest.mark.parametrize("part", [0, 1])
def test_bypass_where_features_of_single_layers_are_added_to_others(part):
    """Qwen3-VL's text layers get features of its vision layers; nobody predicts the place of an image."""
    model, inputs = redrawn(qwen3_vl()), qwen_inputs()
    stack, ids = find_stacks(model)[part], inputs["input_ids"]
    labels = torch.where(ids == model.config.image_token_id, -100, ids)
    found, whole, labelled = (
        score_layers(model, [batch], by="bypass", stack=stack, prefix=prefix).values
        for batch, prefix in ((inputs, True), (inputs, False), ({**inputs, "labels": labels}, False))
    )
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(labelled, whole)
    assert (labels == -100).any() and np.abs(found).min() > 1e-3


@pytest.mark.parametrize("part", [0, 1])
def test_losses_of_other_models_come_from_their_labels(part):
    """T5's first layers hand a position bias to the later ones."""
    model = tiny_model("t5")
    stack = find_stacks(model)[part]
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    found, whole = (
        score_layers(model, batches, by="bypass", stack=stack, prefix=prefix).values for prefix in (True, False)
    )
    np.testing.assert_allclose(found, whole, atol=1e-9)
    taylor = score_layers(model, batches, by="taylor", stack=stack).values
    model.zero_grad()
    model(**batches[0]).loss.backward()
    expected = [sum(float((w.detach() * w.grad).abs().sum()) for w in layer.parameters()) for layer in stack.layers]
    np.testing.assert_allclose(taylor, expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_taylor_is_weight_times_gradient(family, token_batches):
    model = tiny_model(family)
    found = score_layers(model, token_batches, by="taylor").values
    copy = tiny_model(family)
    mean_loss(copy, token_batches).backward()
    layers = find_stacks(copy)[0].layers
    expected = [sum(float((w.detach() * w.grad).abs().sum()) for w in layer.parameters()) for layer in layers]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_everything_in_one_run_leaves_the_model_as_it_was(token_batches):
    model = tiny_model("llama").train()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [set(module.__dict__) for module in model.modules()]
    passes = iter(token_batches)  # cannot be gone through twice
    together = score_layers(model, passes, by=EVERYTHING)
    for name in EVERYTHING:
        alone = score_layers(model, token_batches, by=name)
        np.testing.assert_allclose(together[name].values, alone.values, rtol=1e-6, err_msg=name)
        assert together[name].data == alone.data and alone.data["tokens"] == 37
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [set(module.__dict__) for module in model.modules()] == modules
    assert not frozen.requires_grad and frozen.grad is None and model.training
    assert (model.lm_head.weight.grad == 1).all() and model.model.layers[0].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("name", ["bypass", "taylor"])
def test_an_exception_leaves_nothing_behind(name, token_batches, monkeypatch):
    model = tiny_model("llama")
    modules = [set(module.__dict__) for module in model.modules()]
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of memory")

    handle = model.model.norm.register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_layers(model, token_batches * 3, by=name)
    handle.remove()
    gc.collect()
    assert [set(module.__dict__) for module in model.modules()] == modules
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_sample_of_tokens_does_not_depend_on_batches():
    model = tiny_model("llama")
    ids = torch.randint(3, 60, (30, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8)[None] < torch.randint(2, 9, (30, 1), generator=torch.Generator().manual_seed(1))).long()
    tokens = int(mask.sum())
    (layers, stack) = 4, find_stacks(model)[0]

    def sampled(size, batch_size, **options):
        sample = TokenSample(layers, size=size, **options)
        data = [
            {"input_ids": i, "attention_mask": m}
            for i, m in zip(ids.split(batch_size), mask.split(batch_size), strict=True)
        ]
        run_pass(stack, [sample], data)
        return [states.numpy() for states in sample.states()]

    one, other = sampled(16, 1), sampled(16, 7)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert a.shape == (16, 32)
    assert not np.array_equal(one[0], sampled(16, 7, seed=1)[0])
    whole = sampled(1000, 7)
    assert whole[0].shape == (tokens, 32)
    embedded = model.model.embed_tokens.weight.detach().numpy()[ids[mask.bool()].numpy()]
    assert sorted(map(tuple, whole[0])) == sorted(map(tuple, embedded))


def test_every_token_is_as_likely_to_be_sampled():
    counts = np.zeros(200)
    for seed in range(300):
        sample = TokenSample(1, size=20, seed=seed)
        for start in (0, 50, 100, 150):
            states = torch.arange(start, start + 50.0)[None, :, None]
            sample.update(0, states, states, None)
        counts[sample.states()[0][:, 0].long()] += 1
    assert counts.sum() == 300 * 20
    # Binomial with mean 30: its spread, and no trend along the data.
    assert 3.5 < counts.std() < 7 and abs(np.corrcoef(counts, np.arange(200))[0, 1]) < 0.25


def test_a_loss_needs_labels_or_a_causal_model(token_batches):
    for name in ("bypass", "taylor"):
        with pytest.raises(LayerProbeError, match="BertForMaskedLM, which is not a causal language model, .* labels"):
            score_layers(tiny_model("bert"), token_batches, by=name)


def test_weights_without_gradients(token_batches):
    model = tiny_model("llama")
    weight = model.model.layers[2].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(LayerProbeError, match="taylor needs gradients, and layer 2 of model.layers has torch.int8"):
        score_layers(model, token_batches, by="taylor")


@pytest.mark.parametrize("name", ["angular", "update-norm", "stable-rank", "lid", "cka"])
def test_nan_is_found_at_its_layer(name, token_batches):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LayerProbeError, match=r"layers \[2, 3\] .* not finite"):
        score_layers(model, token_batches, by=name)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_gives_the_same(in_place, token_batches):
    model = tiny_model("llama")
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    found, expected = (score_layers(m, token_batches[:1], by="bypass").values for m in (model, tiny_model("llama")))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


ONE = [{"input_ids": torch.tensor([[5]])}]


@pytest.mark.parametrize(
    "by, data, options, message",
    [
        ("lid", ONE, dict(size=0), "size must be a positive whole number, got 0"),
        ("lid", ONE, {}, "needs at least 4 of them; the data have 1"),
        ("cka", ONE, {}, "needs at least 4 of them; the data have 1"),
        ("stable-rank", ONE, {}, "needs at least 2 of them; the data have 1"),
        ("bypass", ONE, {}, "nothing to predict"),
        ("taylor", ONE, {}, "nothing to predict"),
    ],
)
def test_too_little_data(by, data, options, message):
    with pytest.raises(LayerProbeError, match=message):
        score_layers(tiny_model("llama"), data, by=by, **options)


def test_no_gradients_in_inference_mode(token_batches):
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(LayerProbeError, match="inference_mode"):
        score_layers(model, token_batches, by="taylor")

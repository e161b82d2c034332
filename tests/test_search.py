"""Searching for sets of layers: the losses are those of the pruned models, and the searches find what they claim."""

from itertools import combinations

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import rankdata
from tiny import TEXT, redrawn, tiny_model, tiny_tokenizer

from hf_layerprobe import LayerProbeError, PruningError, plan_pruning, prune_layers, score_layers
from hf_layerprobe.report import loss_curve
from hf_layerprobe.scores.loss import next_token_loss
from hf_layerprobe.search import Curve, SetLosses
from hf_layerprobe.search.rules import beam, contiguous, greedy, refine
from hf_layerprobe.stacks import resolve_stack

TEXTS = [f"text {i}: the quick brown fox {i * 7919} jumps over the lazy dog" for i in range(12)]
SIX = dict(TEXT, num_hidden_layers=6, num_key_value_heads=2)


def batches(rows=3, tokens=12, number=2):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(tokens)[None] < torch.tensor([tokens, 5, tokens - 2])[:rows, None]).long()
    return [
        {"input_ids": torch.randint(3, 60, (rows, tokens), generator=generator), "attention_mask": mask}
        for _ in range(number)
    ]


def any_set(_removed):
    return True


@pytest.fixture(scope="module")
def six():
    """A model of six layers, and the loss without each set of two of them."""
    stack = resolve_stack(redrawn(tf.LlamaForCausalLM(tf.LlamaConfig(**SIX))))
    losses = SetLosses(stack, batches())
    return stack, losses.measure(combinations(range(6), 2))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_neox", "opt"])
def test_losses_are_those_of_the_pruned_models(family):
    model = tiny_model(family).train()
    stack, data = resolve_stack(model), batches()
    losses = SetLosses(stack, data)
    found = losses.measure([(), (0,), (2,), (1, 2), (3,)])
    assert losses._stepwise
    for removed, loss in found.items():
        pruned = prune_layers(model, remove=removed) if removed else model
        assert loss == pytest.approx(next_token_loss(pruned, data), rel=1e-5), removed
    assert model.training and all("forward" not in vars(layer) for layer in stack.layers)


def test_layers_that_cannot_be_stepped_through_are_bypassed(six):
    stack, wanted = six
    losses = SetLosses(stack, batches())
    losses._stepwise = False
    for removed, loss in losses.measure([(0, 1), (2, 4)]).items():
        assert loss == pytest.approx(wanted[removed], rel=1e-5)


def test_each_set_is_measured_once_from_where_it_differs():
    stack = resolve_stack(tiny_model("llama"))
    losses = SetLosses(stack, batches(number=1))
    runs = []
    for index, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    losses.measure([(i,) for i in range(4)])
    # The trial; then all layers once for what they are called with, and those behind each removed one.
    assert runs[-4 - (3 + 0 + 1 + 2) :].count(0) <= 2
    before = len(runs)
    losses.measure([(0,), (3,)])
    assert len(runs) == before


def test_the_best_block(six):
    stack, wanted = six
    found = contiguous(SetLosses(stack, batches()), 2, any_set)
    assert found.removed == min(((i, i + 1) for i in range(5)), key=wanted.get)


def test_few_blocks_are_measured_in_full(six, monkeypatch):
    stack, wanted = six
    data = batches()
    start = [{name: value[:1, :8] for name, value in data[0].items()}]
    look = SetLosses(stack, start).measure([(i, i + 1) for i in range(5)])
    monkeypatch.setattr("hf_layerprobe.search.rules.BLOCKS", 2)
    monkeypatch.setattr("hf_layerprobe.search.rules.LOOK_TOKENS", 8)
    losses = SetLosses(stack, data)
    found = contiguous(losses, 2, any_set)
    assert set(losses.known) == set(sorted(look, key=look.get)[:2])
    assert found.removed == min(losses.known, key=wanted.get)


def test_greedy_takes_the_best_next_layer(six):
    stack, wanted = six
    losses = SetLosses(stack, batches())
    found = greedy(losses, 2, any_set)
    single = losses.measure([(i,) for i in range(6)])
    first = min(single, key=single.get)[0]
    assert found.removed == min((each for each in wanted if first in each), key=wanted.get)
    assert [entry["remove"] for entry in found.path] == [[], [first], list(found.removed)]
    assert found.path[2]["loss"] == pytest.approx(wanted[found.removed])


@pytest.mark.parametrize("tried", [1, 2, 3])
def test_any_number_of_layers_can_go(six, tried, monkeypatch):
    """However few layers a round tries; those that were left out come back."""
    monkeypatch.setattr("hf_layerprobe.search.rules.TRIED", tried)
    stack, _ = six
    for search, number in ((greedy, 5), (beam, 5), (greedy, 6)):
        losses = SetLosses(stack, batches())
        found = search(losses, number, any_set)
        assert len(found.removed) == number and [len(entry["remove"]) for entry in found.path] == list(
            range(number + 1)
        )
        if search is greedy:
            assert len(losses.known) == 1 + 6 + sum(min(tried, 6 - size) for size in range(1, number))
    last = greedy(SetLosses(stack, batches()), 2, lambda removed: len(removed) < 2 or 5 in removed)
    assert 5 in last.removed  # it is not among the cheapest


def test_a_loss_that_is_not_finite_is_the_worst(six, monkeypatch):
    stack, _ = six
    plain = SetLosses._measure

    def overflowing(self, order, bar):
        plain(self, order, bar)
        self.known.update({each: float("inf") for each in order if 0 in each})

    monkeypatch.setattr(SetLosses, "_measure", overflowing)
    for search in (contiguous, greedy, beam):
        assert 0 not in search(SetLosses(stack, batches()), 2, any_set).removed
    with pytest.raises(
        LayerProbeError, match="The loss without any 6 layers .* is not finite. Run the model in float32"
    ):
        greedy(SetLosses(stack, batches()), 6, any_set)


def test_nan_is_infinite():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[:] = 1e38
    stack = resolve_stack(model)
    with pytest.raises(LayerProbeError, match="LlamaForCausalLM has logits that are no numbers"):
        SetLosses(stack, batches())
    model.model.layers[1].mlp.down_proj.weight.data[:] = 0.1
    losses = SetLosses(stack, batches())
    model.model.layers[1].mlp.down_proj.weight.data[:] = 1e38
    assert losses.measure([(0,)]) == {(0,): float("inf")}
    assert losses.measure([(1,)])[(1,)] < 20


def test_a_wide_beam_is_exhaustive(six):
    stack, wanted = six
    assert beam(SetLosses(stack, batches()), 2, any_set, width=6).removed == min(wanted, key=wanted.get)


def test_swaps_only_improve(six):
    stack, wanted = six
    worst = max(wanted, key=wanted.get)
    losses = SetLosses(stack, batches())
    better = refine(losses, worst, any_set)
    assert wanted[better] < wanted[worst] and len(better) == 2
    assert refine(losses, better, any_set) == better


def test_only_sets_that_can_go(six):
    stack, wanted = six

    def keeps_the_first(removed):
        return 0 not in removed

    best = min((each for each in wanted if 0 not in each), key=wanted.get)
    assert beam(SetLosses(stack, batches()), 2, keeps_the_first, width=6).removed == best
    with pytest.raises(PruningError, match="No 2 layers of 'model.layers'"):
        contiguous(SetLosses(stack, batches()), 2, lambda _: False)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("by", ["greedy", "beam"])
def test_what_a_search_names_can_go(by, number):
    """Of a Jamba only sets that leave its attention layers and experts at equal distances."""
    config = tf.JambaConfig(
        **{**SIX, "num_hidden_layers": 8}, num_experts=2, expert_layer_period=2, attn_layer_period=4, attn_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4, pad_token_id=0,
    )  # fmt: skip
    model = redrawn(tf.JambaForCausalLM(config))
    plan = plan_pruning(model, TEXTS, num_layers=number, by=by, tokenizer=tiny_tokenizer(), max_tokens=128)
    curve, stack = plan.curve(), resolve_stack(model)
    assert curve.removed[0] == () and curve.removed[-1] == plan.remove and len(plan.remove) == number
    for removed in curve.removed:
        stack.check([layer for layer in range(8) if layer not in removed])


def test_a_search_resumes(six, tmp_path):
    stack, wanted = six
    file = tmp_path / "losses.json"
    SetLosses(stack, batches(), resume=file).measure(list(wanted)[:7])
    losses = SetLosses(stack, batches(), resume=file)
    assert losses.known == {each: wanted[each] for each in list(wanted)[:7]}
    with pytest.raises(LayerProbeError, match="losses of another model, stack or text"):
        SetLosses(stack, batches(tokens=11), resume=file)
    other = redrawn(tf.LlamaForCausalLM(tf.LlamaConfig(**SIX)))
    with torch.no_grad():
        other.model.layers[3].mlp.down_proj.weight[1:] *= 0.5  # its first values are the same
    with pytest.raises(LayerProbeError, match="losses of another model, stack or text"):
        SetLosses(resolve_stack(other), batches(), resume=file)
    with pytest.raises(LayerProbeError, match="is a folder; name a file"):
        SetLosses(stack, batches(), resume=tmp_path)
    file.write_text("{}")
    with pytest.raises(LayerProbeError, match="holds no losses of a search"):
        SetLosses(stack, batches(), resume=file)


def test_a_budget(six):
    stack, _ = six
    with pytest.raises(LayerProbeError, match="minutes is how long a search may take; got 0"):
        SetLosses(stack, batches(), minutes=0)
    with pytest.raises(LayerProbeError, match="minutes is how long a search may take; got '5'"):
        SetLosses(stack, batches(), minutes="5")
    for search in (greedy, contiguous):
        with pytest.raises(LayerProbeError, match="time was up before"):
            search(SetLosses(stack, batches(), minutes=1e-9), 2, any_set)
    losses = SetLosses(stack, batches(), minutes=10)
    clock = iter([0, 0, 10**9])
    losses.deadline = 10**8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_layerprobe.search.losses.AT_A_TIME", 2)
        patch.setattr("hf_layerprobe.search.losses.time.monotonic", lambda: next(clock))
        assert len(losses.measure(combinations(range(6), 2))) == 4
    losses = SetLosses(stack, batches(), minutes=10)
    found = greedy(losses, 1, any_set)
    losses.deadline = 0
    assert refine(losses, found.removed, any_set) == found.removed
    with pytest.raises(LayerProbeError, match="time was up after 1 of 2 layers"):
        greedy(losses, 2, any_set)


@pytest.mark.parametrize("by", ["contiguous", "greedy", "beam"])
def test_plans_by_search(by):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plan = plan_pruning(model, TEXTS, num_layers=2, by=by, tokenizer=tokenizer, max_length=32)
    assert plan.by == by and len(plan.remove) == 2 and plan.scores == {}
    assert type(prune_layers(model, plan)) is type(model)
    with pytest.raises(LayerProbeError, match=f"by='{by}' measures several sets of layers on text"):
        plan_pruning(model, num_layers=1, by=by)


def test_auto_with_a_budget_searches_longer(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    file = tmp_path / "losses.json"
    plan = plan_pruning(model, TEXTS, num_layers=2, tokenizer=tokenizer, minutes=5, resume=file)
    rules = [candidate["by"] for candidate in plan.candidates]
    assert rules[-3:] == ["contiguous", "greedy", "swaps"] and file.is_file()
    again = plan_pruning(model, TEXTS, num_layers=2, tokenizer=tokenizer, minutes=5, resume=file)
    assert again.remove == plan.remove
    short = plan_pruning(model, TEXTS, num_layers=2, tokenizer=tokenizer, minutes=1e-9)
    assert "greedy" not in [candidate["by"] for candidate in short.candidates]


def test_the_combination_is_the_mean_rank(token_batches):
    model = tiny_model("llama")
    plan = plan_pruning(model, token_batches, num_layers=2, by="combined")
    docs = score_layers(model, by="docs").importance
    avss = score_layers(model, token_batches, by="avss-relative").importance
    wanted = (rankdata(docs) + rankdata(avss)) / 2 - 1
    assert plan.by == "combined" and plan.scores["values"] == wanted.tolist()
    assert list(plan.remove) == sorted(np.argsort(wanted, kind="stable")[:2].tolist())
    assert plan.scores["source"].startswith("our own definition")
    with pytest.raises(LayerProbeError, match="half measured on activations"):
        plan_pruning(model, num_layers=2, by="combined")


def test_the_curve_of_a_greedy_plan(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plan = plan_pruning(model, TEXTS, num_layers=3, by="greedy", tokenizer=tokenizer)
    curve = plan.curve()
    assert curve.numbers == (0, 1, 2, 3) and curve.removed[3] == plan.remove and curve.knee in curve.numbers
    assert loss_curve(curve, tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(LayerProbeError, match="made by 'last', which measured one number of layers only"):
        plan_pruning(model, num_layers=1, by="last").curve()


@pytest.mark.parametrize(
    "losses, knee", [((1, 1.1, 1.2, 1.3, 3, 6), 3), ((1, 2, 3, 4, 5, 6), 0), ((1, 4, 5, 5.5, 5.8, 6), 0), ((2,), 0)]
)
def test_the_knee_is_where_it_turns_steep(losses, knee):
    removed = tuple(tuple(range(n)) for n in range(len(losses)))
    assert Curve(tuple(range(len(losses))), losses, removed).knee == knee


@pytest.mark.parametrize("by", ["greedy", "auto"])
def test_options_that_a_search_does_not_have(by):
    with pytest.raises(LayerProbeError, match=f"by='{by}' has no option 'max_tokns'. Did you mean 'max_tokens'"):
        plan_pruning(tiny_model("llama"), TEXTS, num_layers=1, by=by, tokenizer=tiny_tokenizer(), max_tokns=3)
    with pytest.raises(LayerProbeError, match="max_tokens"):
        plan_pruning(tiny_model("llama"), TEXTS, num_layers=1, by=by, tokenizer=tiny_tokenizer(), max_tokens=0)

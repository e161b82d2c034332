"""Multiple choice, harness tasks, metrics and speed, before and after, against lm-evaluation-harness and by hand."""

import math

import evaluate
import numpy as np
import pytest
import torch
import transformers as tf
from datasets import ClassLabel, Dataset, Features, Value
from tiny import TEXT, redrawn, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from hf_layerprobe import (
    LayerProbeError,
    evaluate_choices,
    evaluate_metric,
    evaluate_tasks,
    measure_speed,
    prune_layers,
)
from hf_layerprobe.evaluation import TaskComparison, TaskResult
from hf_layerprobe.evaluation.intervals import resampled_ratio, share_interval
from hf_layerprobe.evaluation.likelihood import losses

WORDS = ("dog", "cat", "a fox", "the house", "red", "green tea")
LETTERS = np.random.default_rng(0).choice(list("abcdefgh"), size=(24, 3, 6))
# Two or three choices of unequal length: likelihood as it is and per byte choose differently.
ROWS = [
    {
        "goal": f"what is {WORDS[i % 6]} {i}? ",
        "options": [" " + "".join(each[: 2 + (i + n) % 4]) for n, each in enumerate(choices)][: 2 + i % 2],
        "label": i % 2,
    }
    for i, choices in enumerate(LETTERS)
]
HARNESS = dict(
    task="mine", custom_dataset=lambda **_: {"test": Dataset.from_list(ROWS)}, test_split="test",
    output_type="multiple_choice", doc_to_text="{{goal}}", doc_to_choice="{{options}}", doc_to_target="{{label}}",
    target_delimiter="", metric_list=[{"metric": "acc"}, {"metric": "acc_bytes"}],
)  # fmt: skip
COLUMNS = dict(prompt="{goal}", choices="options", answer="label")


@pytest.fixture(scope="module")
def models():
    dense = tiny_model("llama")
    return dense, prune_layers(dense, remove=[1, 2])


@pytest.fixture(scope="module")
def harness(models):
    dense, pruned = models
    return evaluate_tasks(pruned, HARNESS, tokenizer=tiny_tokenizer(), baseline=dense)["mine"]


@pytest.mark.parametrize("metric", ["acc", "acc_bytes"])
def test_choices_agree_with_the_harness(models, harness, metric):
    dense, pruned = models
    found = evaluate_choices(
        pruned, ROWS, tokenizer=tiny_tokenizer(), baseline=dense, per_byte=metric == "acc_bytes", name="mine", **COLUMNS
    )
    assert found.to_dict() == harness[metric].to_dict()
    assert 0 < found.after.value < 1
    assert harness["acc"].before.value != harness["acc_bytes"].before.value
    assert found.after.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_likelihoods_are_those_of_the_tokens(models):
    """A transcription, one choice at a time."""
    model, tokenizer = models[0], tiny_tokenizer()

    def loss(context, choice):
        ids = tokenizer(context + choice)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return -sum(logs[i - 1, ids[i]].item() for i in range(len(tokenizer(context)["input_ids"]), len(ids)))

    right = [np.argmin([loss(row["goal"].rstrip(), " " + each) for each in row["options"]]) for row in ROWS]
    found = evaluate_choices(
        model, ROWS, tokenizer=tokenizer, prompt="{goal}", choices="options", answer=lambda row: right[ROWS.index(row)]
    )
    assert found.value == 1 and found.after.interval[0] < 1


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("partial", [True, False], ids=["some logits", "all logits"])
def test_only_logits_that_are_read_are_made(family, partial):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    if not partial:  # a model that cannot leave any out
        forward = model.forward
        model.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    tokens = [
        (tokenizer(row["goal"])["input_ids"], tokenizer(each)["input_ids"]) for row in ROWS for each in row["options"]
    ]
    requests = [((before + choice)[:-1], choice) for before, choice in tokens]
    made = []
    head = model.get_output_embeddings().register_forward_hook(
        lambda _m, _a, logits: made.append(logits[..., 0].numel())
    )
    found = losses(model, requests, batch_size=5, desc="")
    head.remove()
    assert (sum(made) < sum(len(read) for read, _ in requests)) == partial
    for (read, wanted), value in zip(requests, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read]), attention_mask=None, use_cache=False).logits[
                0, -len(wanted) :
            ]
        expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(wanted), reduction="sum").item()
        assert value == pytest.approx(expected, rel=1e-5)


def test_labels_share_one_pass(models):
    rows = Dataset.from_list(
        [{"text": word, "label": i % 2} for i, word in enumerate(WORDS)],
        features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}),
    )
    seen = []
    handle = models[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    options = dict(tokenizer=tiny_tokenizer(), prompt="{text}:", choices=["n", "y"], batch_size=4)
    by_index = evaluate_choices(models[0], rows, answer="label", **options)
    handle.remove()
    assert sum(seen[2:]) == len(rows)  # the first two look whether the model is causal
    by_text = evaluate_choices(models[0], rows, answer=lambda row: "ny"[row["label"]], **options)
    by_truth = evaluate_choices(models[0], rows, answer=lambda row: row["label"] == 1, **options)
    assert by_index == by_text == by_truth


def test_a_known_baseline_is_not_measured_again(models):
    dense, pruned = models
    options = dict(tokenizer=tiny_tokenizer(), name="mine", **COLUMNS)
    known = evaluate_choices(dense, ROWS, **options).after
    found = evaluate_choices(pruned, ROWS, baseline=known, **options)
    assert found.to_dict() == evaluate_choices(pruned, ROWS, baseline=dense, **options).to_dict()
    with pytest.raises(LayerProbeError, match="acc of 'mine' on 24 items, and this is acc of 'mine' on 20"):
        evaluate_choices(pruned, ROWS[:20], baseline=known, **options)


def test_what_is_no_model(models):
    model, options = models[0], dict(tokenizer=tiny_tokenizer())
    comparison = evaluate_choices(model, ROWS[:2], **options, **COLUMNS)
    with pytest.raises(
        LayerProbeError, match="baseline is a TaskComparison; .* or TaskResult. Pass baseline=comparison.after"
    ):
        evaluate_choices(model, ROWS, baseline=comparison, **options, **COLUMNS)
    speed = measure_speed(model, prompt_tokens=4, new_tokens=1, repeats=1)
    with pytest.raises(
        LayerProbeError, match=r"baseline is a SpeedComparison; expected a loaded model\. Pass baseline= the"
    ):
        measure_speed(model, baseline=speed)
    for refused in (
        lambda: evaluate_choices("folder", ROWS, **options, **COLUMNS),
        lambda: evaluate_tasks("folder", HARNESS, **options),
        lambda: evaluate_metric("folder", Dataset.from_list(ROWS), task="text-classification", metric="accuracy"),
        lambda: measure_speed("folder", baseline=model),
    ):
        with pytest.raises(LayerProbeError, match="model is a str; expected a loaded model"):
            refused()


def test_a_long_prompt_is_cut_on_the_left(models):
    row = {"goal": "x" * 50 + "what is it", "options": [" a", " b"], "label": 0}
    model, tokenizer = models[0], tiny_tokenizer()
    short = dict(row, goal=row["goal"][-9:])
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    evaluate_choices(model, [row], tokenizer=tokenizer, max_length=10, **COLUMNS)
    evaluate_choices(model, [short], tokenizer=tokenizer, max_length=10, **COLUMNS)
    handle.remove()
    assert seen[2] == seen[5] and len(seen[2][0]) == 10


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([], COLUMNS, "no row to evaluate on"),
        (["text"], COLUMNS, "Row 0 is a str"),
        ("text", COLUMNS, "data is a str"),
        (ROWS, dict(COLUMNS, prompt="{gaol}"), "KeyError: 'gaol'. It has the columns goal, options, label"),
        (ROWS, dict(COLUMNS, choices="goal"), "the choices are 'what is dog"),
        (ROWS, dict(COLUMNS, choices=["one"]), "at least two texts"),
        (ROWS, dict(COLUMNS, choices=["one", ""]), "at least two texts"),
        (ROWS, dict(COLUMNS, answer=lambda row: 7), "answer 7 is none of the choices"),
        (ROWS, dict(COLUMNS, answer=lambda row: "z"), "answer 'z' is none of the choices"),
        (ROWS, dict(COLUMNS, choices=["a" * 600, "b"]), "601 tokens after its prompt"),
    ],
)
def test_unusable_rows(models, rows, columns, message):
    with pytest.raises(LayerProbeError) as error:
        evaluate_choices(models[0], rows, tokenizer=tiny_tokenizer(), **columns)
    assert message in str(error.value)


def test_choices_need_a_causal_model():
    with pytest.raises(LayerProbeError, match="BertForMaskedLM is not a causal language model"):
        evaluate_choices(tiny_model("bert"), ROWS, tokenizer=tiny_tokenizer(), **COLUMNS)


def test_harness_metrics_that_are_no_means(models):
    """Perplexities have no score of each item, and are better when lower."""
    dense, pruned = models
    texts = dict(
        task="texts", custom_dataset=lambda **_: {"test": Dataset.from_list([{"text": w} for w in WORDS])},
        test_split="test", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    )  # fmt: skip
    found = evaluate_tasks(pruned, texts, tokenizer=tiny_tokenizer(), baseline=dense, limit=4)["texts"]
    found = found["byte_perplexity"]
    assert not found.after.higher_is_better and found.after.interval is None and found.after.items == 4
    assert found.retained == pytest.approx(found.before.value / found.after.value)


def test_a_task_file_of_ones_own(models, tmp_path):
    data = tmp_path / "rows.jsonl"
    Dataset.from_list(ROWS).to_json(data)
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{goal}}'\ndoc_to_choice: '{{options}}'\n"
        "doc_to_target: '{{label}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    found = evaluate_tasks(models[0], str(tmp_path / "own.yaml"), tokenizer=tiny_tokenizer())["own"]["acc"]
    alone = evaluate_choices(models[0], ROWS, tokenizer=tiny_tokenizer(), name="own", **COLUMNS)
    assert found.to_dict() == alone.to_dict() and found.before is None and found.retained is None


def test_unknown_task(models):
    with pytest.raises(LayerProbeError, match="cannot load"):
        evaluate_tasks(models[0], dict(HARNESS, output_type="guess"), tokenizer=tiny_tokenizer())
    with pytest.raises(LayerProbeError, match="names no task"):
        evaluate_tasks(models[0], [], tokenizer=tiny_tokenizer())


METRIC = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_any_metric_through_the_evaluator(tmp_path):
    (tmp_path / "share.py").write_text(METRIC)
    dense = redrawn(tf.BertForSequenceClassification(tf.BertConfig(**TEXT)))
    pruned, tokenizer = prune_layers(dense, remove=[1, 2]), tiny_tokenizer()
    texts = list(WORDS * 2)
    with torch.no_grad():
        guesses = [
            [m(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits.argmax().item() for t in texts]
            for m in (dense, pruned)
        ]
    labels = [a if i % 3 else 1 - a for i, a in enumerate(guesses[0])]
    found = evaluate_metric(
        pruned, Dataset.from_dict({"text": texts, "label": labels}), task="text-classification", baseline=dense,
        metric=str(tmp_path / "share.py"), tokenizer=tokenizer, label_mapping={"LABEL_0": 0, "LABEL_1": 1},
    )["share"]  # fmt: skip
    right = [np.mean([g == label for g, label in zip(each, labels, strict=True)]) for each in guesses]
    assert (found.before.value, found.after.value) == pytest.approx(tuple(right))
    assert found.before.value == pytest.approx(2 / 3) and found.after.items == 12
    assert found.before.interval[0] <= found.before.value <= found.before.interval[1]
    with pytest.raises(LayerProbeError, match="cannot take task 'guessing'"):
        evaluate_metric(dense, Dataset.from_dict({"text": texts}), task="guessing", metric=evaluate.Metric)


def test_speed_and_size(models, tmp_path):
    dense, pruned = models
    found = measure_speed(pruned, baseline=dense, prompt_tokens=16, new_tokens=4, repeats=2)
    pruned.save_pretrained(tmp_path)
    assert 0 <= (tmp_path / "model.safetensors").stat().st_size - found.after.file_bytes < 10_000
    assert found.after.parameters == sum(p.numel() for p in pruned.parameters())
    assert found.after.prefill_tokens_per_second > 0 and found.after.decode_tokens_per_second > 0
    assert found.ratios["parameters"] < 1 and set(found.ratios) == set(found.to_dict()["after"])


def test_speed_of_others(models):
    encoder = measure_speed(tiny_model("bert"), prompt_tokens=16, repeats=1)
    assert encoder.after.decode_tokens_per_second is None and encoder.ratios is None
    assert (
        measure_speed(tiny_model("bart"), prompt_tokens=8, new_tokens=2, repeats=1).after.decode_tokens_per_second > 0
    )
    with pytest.raises(LayerProbeError, match="reads pixel_values"):
        measure_speed(tiny_model("vit"))
    with pytest.raises(LayerProbeError, match="GPT2LMHeadModel has 64 positions"):
        measure_speed(tiny_model("gpt2"))


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny_model("gpt2")
    found = measure_speed(model, prompt_tokens=4, new_tokens=1, repeats=1).after
    model.save_pretrained(tmp_path)
    assert 0 <= (tmp_path / "model.safetensors").stat().st_size - found.file_bytes < 10_000
    assert found.memory_bytes >= found.file_bytes


def test_intervals_cover_as_often_as_they_say():
    """Over many draws from a known distribution, the true ratio lies in about 95 of 100 intervals."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        weights = generator.uniform(1, 3, 80)
        values = 0.5 * weights + generator.normal(0, 0.3, 80)
        low, high = np.quantile(resampled_ratio(values, weights), [0.025, 0.975])
        hits += low <= 0.5 <= high
    assert 51 <= hits <= 60


@pytest.mark.parametrize("right, items", [(0, 10), (10, 10), (7, 20), (900, 1500)])
def test_shares_have_wilsons_interval(right, items):
    from scipy.stats import binomtest

    wanted = binomtest(right, items).proportion_ci(method="wilson")
    assert share_interval(right, items) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_shares_of_what_was_there():
    before = TaskResult.mean("t", "acc", np.array([1.0] * 80 + [0.0] * 20), chance=0.5)
    after = TaskResult.mean("t", "acc", np.array([1.0] * 65 + [0.0] * 35), chance=0.5)
    found = TaskComparison(after, before)
    assert found.retained == pytest.approx(0.65 / 0.8) and found.retained_above_chance == pytest.approx(0.15 / 0.3)
    low, high = found.retained_interval
    # Paired: the 65 are among the 80, so their share is binomial.
    assert (low, high) == pytest.approx((0.8125 - 1.96 * math.sqrt(0.8125 * 0.1875 / 80), 0.895), abs=0.02)
    guessing = TaskComparison(after, TaskResult.mean("t", "acc", np.array([1.0, 0.0]), chance=0.5))
    assert guessing.retained_above_chance is None and guessing.retained_above_chance_interval is None


def test_a_model_that_says_nothing_has_no_accuracy():
    model = tiny_model("llama")
    options = dict(tokenizer=tiny_tokenizer(), **COLUMNS)
    model.lm_head.weight.data[40:] = float("nan")  # of some tokens alone
    with pytest.raises(LayerProbeError, match="has logits that are no numbers"):
        evaluate_choices(model, ROWS, **options)


def test_a_baseline_on_other_rows(models):
    options = dict(tokenizer=tiny_tokenizer(), name="mine", **COLUMNS)
    known = evaluate_choices(models[0], ROWS, **options).after
    with pytest.raises(LayerProbeError, match="'mine' on 24, or on others; evaluate it on the same"):
        evaluate_choices(models[1], ROWS[1:] + ROWS[:1], baseline=known, **options)


def test_one_item_has_no_interval(models):
    found = evaluate_choices(models[1], ROWS[:1], tokenizer=tiny_tokenizer(), baseline=models[0], **COLUMNS)
    assert found.retained_interval is None or np.isnan(found.retained_interval).all()


def test_chance_beside_mutual_information(models):
    """The harness asks each choice once more, without the prompt."""
    task = {**HARNESS, "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]}
    found = evaluate_tasks(models[1], task, tokenizer=tiny_tokenizer())["mine"]
    assert found["acc"].after.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_prompt_that_begins_with_bos(models):
    """As chat templates write it; the harness reads it once too."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    begun = {**COLUMNS, "prompt": "<s>{goal}"}
    read = []
    handle = models[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: read.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    found = evaluate_choices(models[0], ROWS, tokenizer=tokenizer, **begun)
    handle.remove()
    assert read[2:] and all(row[0] == 1 and row[1] != 1 for row in read[2:])  # the first two look whether it is causal
    assert found.value == evaluate_choices(models[0], ROWS, tokenizer=tokenizer, **COLUMNS).value


@pytest.mark.parametrize(
    "prompt, message",
    [("{goal", "Row 0 does not fit: ValueError"), (lambda row: 3, "the prompt is a int; expected text")],
)
def test_prompts_that_cannot_be_made(prompt, message):
    with pytest.raises(LayerProbeError, match=message):
        evaluate_choices(tiny_model("llama"), ROWS, tokenizer=tiny_tokenizer(), **{**COLUMNS, "prompt": prompt})


def test_speed_is_with_the_cache_whatever_the_config_says():
    model = tiny_model("llama")
    model.generation_config.use_cache, model.generation_config.max_time = False, 1e-9
    read = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    measure_speed(model, prompt_tokens=8, new_tokens=4, repeats=1)
    assert sorted(set(read)) == [1, 8]

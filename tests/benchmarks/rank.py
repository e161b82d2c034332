"""How well do scores rank layers? Every score of SmolLM2's layers against the truth on text that no score has seen.

Scores are taken on one half of the Wikipedia passages. On the other half are measured the loss increase when each single
layer is bypassed (rank correlation of each score with it), and the perplexity when the 3, 5 and 7 layers that each score
calls least important are bypassed together (in bfloat16; all else is float32). What is done is kept in a file, so that a
run that was stopped goes on.

    python tests/benchmarks/rank.py --output rank.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprobe import find_stacks, score_layers
from hf_layerprobe.activations import batches
from hf_layerprobe.embedded import embedded_model, embedded_texts
from hf_layerprobe.scores import SCORES
from hf_layerprobe.search.losses import SetLosses

REMOVED = (3, 5, 7)
SEEDS = range(5)
AT_ONCE = 12


class Results:
    """Numbers by name in a JSON file, computed once."""

    def __init__(self, path: Path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name: str, compute):
        if name not in self.found:
            self.found[name] = compute()
            self.path.write_text(json.dumps(self.found))
        return self.found[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of each half of the text")
    parser.add_argument("--output", type=Path, default=Path("rank.json"))
    options = parser.parse_args()
    results = Results(options.output)
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    stack, texts = find_stacks(model)[0], embedded_texts()
    data = {"tokenizer": tokenizer, "max_tokens": options.tokens}
    calibration, held_out = texts[0:2000:2], texts[1:2000:2]

    streamed = [name for name, score in SCORES.items() if score.streams]
    fixed = [name for name, score in SCORES.items() if not score.needs_data and name != "random"]
    own = [name for name, score in SCORES.items() if score.own_runs]
    plans: dict[str, dict] = {}
    for names in (streamed, *([name] for name in own + fixed)):
        found = results.get(
            "+".join(names),
            lambda names=names: {
                name: {
                    "importance": score.importance.tolist(),
                    "remove": {str(n): score.least_important(n) for n in REMOVED},
                }
                for name, score in score_layers(model, calibration, by=names, **data).items()
            },
        )
        plans |= found
    for seed in SEEDS:
        score = score_layers(model, by="random", seed=seed)
        plans[f"random-{seed}"] = {
            "importance": score.importance.tolist(),
            "remove": {str(n): score.least_important(n) for n in REMOVED},
        }
    truth = results.get("truth", lambda: score_layers(model, held_out, by="bypass", **data).values.tolist())
    # Many sets, and on many processors twice as fast; what the rounding adds is far less than sets differ by.
    model.to(torch.bfloat16)
    rows = list(batches(held_out, model, tokenizer, max_tokens=options.tokens))
    sets = {tuple(layers) for plan in plans.values() for layers in plan["remove"].values()}
    # In an order in which neighbours share their first layers, which then run once.
    order = sorted([(), *sets], key=lambda removed: [layer in removed for layer in range(stack.num_layers)])
    losses = {}
    for start in range(0, len(order), AT_ONCE):
        group = order[start : start + AT_ONCE]
        found = results.get(
            f"losses of {group}",
            lambda group=group: [loss for _, loss in sorted(SetLosses(stack, rows).measure(group).items())],
        )
        losses |= dict(zip(sorted(group), found, strict=True))
    _report(plans, truth, {layers: math.exp(loss) for layers, loss in losses.items()})


def _report(plans: dict, truth: list[float], perplexity: dict[tuple, float]) -> None:
    print(f"dense perplexity {perplexity[()]:.2f}; torch {torch.__version__}")
    print("loss increase by layer:", np.round(truth, 3).tolist())
    print(f"| score | rank correlation | {' | '.join(f'without {n}' for n in REMOVED)} | the {REMOVED[-1]} |")
    print("|---|---:|" + "---:|" * len(REMOVED) + "---|")
    random = [plan for name, plan in plans.items() if name.startswith("random-")]
    table = [(name, [plan]) for name, plan in plans.items() if plan not in random] + [("random (5 seeds)", random)]
    for name, members in sorted(table, key=lambda row: -_correlation(row[1], truth)):
        removed = [[perplexity[tuple(plan["remove"][str(n)])] for plan in members] for n in REMOVED]
        which = ", ".join(map(str, members[0]["remove"][str(REMOVED[-1])])) if len(members) == 1 else ""
        print(f"| `{name}` | {_correlation(members, truth):+.2f} | {' | '.join(map(_range, removed))} | {which} |")


def _correlation(plans: list[dict], truth: list[float]) -> float:
    return float(np.mean([spearmanr(plan["importance"], truth).statistic for plan in plans]))


def _range(values: list[float]) -> str:
    def number(value: float) -> str:
        return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"

    return number(values[0]) if len(values) == 1 else f"{number(min(values))} to {number(max(values))}"


if __name__ == "__main__":
    main()

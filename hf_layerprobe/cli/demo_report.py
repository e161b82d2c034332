"""What the demo says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from .outputs import number, ranges, show_table


def show_results(results: dict[str, Any], output: Path) -> None:
    """Prints the table of rules, the proof of the saved model, samples of text, and where the files are."""
    dense, proof = results["dense"], results["proof"]
    rows = [("dense model", "", number(dense["perplexity"]), "1.00", f"{dense['bits_per_byte']:.3f}", "")]
    for row in sorted(results["rules"], key=lambda row: row["loss"]):
        verdict = "wrecks the model" if row["wrecks_the_model"] else "best" if row["rule"] == results["best"] else ""
        rows.append(
            (
                row["label"],
                ranges(row["removed"]),
                number(row["perplexity"]),
                number(row["perplexity_ratio"]),
                f"{row['bits_per_byte']:.3f}",
                verdict,
            )
        )
    removed = len(results["rules"][0]["removed"])
    show_table(
        f"{results['model']} without {removed} of its {results['num_layers']} layers, on {dense['tokens']:,} unseen tokens",
        ("rule", "layers removed", "perplexity", "× dense", "bits/byte", ""),
        rows,
        results["note"],
    )
    console = Console(soft_wrap=True, highlight=False)
    wrecked = [row["label"] for row in results["rules"] if row["wrecks_the_model"]]
    if wrecked:
        console.print(f"Wrecks the model (perplexity 1,000 times the dense model's, or more): {'; '.join(wrecked)}.")
    console.print("The best is chosen on this text, so its own numbers are slightly optimistic.")
    console.print(
        f"Saved and loaded again: largest logit difference to the original with those layers bypassed "
        f"{proof['max_logit_difference']:.1e}; perplexity {number(proof['perplexity']['reloaded'])}, measured before "
        f"saving {number(proof['perplexity']['measured'])}; generation with cache equals without: "
        f"{'yes' if proof['cached_equals_uncached'] else 'no'}."
    )
    for which, sample in results["samples"].items():
        console.print(f"{which} writes: {sample!r}", markup=False)
    console.print(f"\nIn {output} ({results['seconds']:.0f} s):", markup=False)
    console.print("  figures/overview.png, figures/scores_by_depth.png, figures/docs_*.png")
    console.print("  pruned/       the best model, for AutoModelForCausalLM.from_pretrained")
    console.print("  results.json  all numbers")

"""The steps of the demo, each a few calls of the library."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from .. import (
    Comparison,
    LayerScores,
    PruningPlan,
    SimilarityMatrix,
    docs,
    evaluate_model,
    plan_pruning,
    prune_layers,
    score_layers,
)
from ..embedded import embedded_texts
from ..errors import VerificationError
from ..files import write_atomically
from ..report import depth_plot, heat_map, overview
from ..stacks import LayerStack, bypassed, resolve_stack
from ..surgery.gate import TOLERANCE
from .inputs import first_tokens, halves, note_on, open_model, open_tokenizer
from .outputs import strict

ACTIVATION_SCORES = ("avss-published", "avss-released", "avss-relative", "influence")
# How the rules are called in the table: never our own number under a paper's name.
LABELS = {
    "avss-published": "AVSS, published",
    "avss-relative": "AVSS, relative (ours)",
    "influence": "block influence (ShortGPT)",
    "last": "the last layers",
}
SEEDS = (0, 1, 2)
WRECKED = 1000  # times the perplexity of the dense model
PROMPT = "The city of Paris is known for"


def run_steps(name: str, folder: Path, *, small: bool) -> dict[str, Any]:
    """Runs the demo and writes figures, results and the best pruned model.

    Args:
        name: A folder, a Hub id or `smollm2`.
        folder: An empty folder.
        small: Less text, two kinds of matrices and one random plan.

    Returns:
        What was found; also in `results.json`.

    Raises:
        LayerProbeError: A model that cannot be loaded, is not a causal language model, or has no layers to remove.
        VerificationError: The saved model does not do what the measured one did.
    """
    tell, started = Console(stderr=True), time.monotonic()
    calibration_tokens, held_out_tokens = (512, 256) if small else (4096, 4096)

    tell.rule(f"1/6 Load {name}")
    model, tokenizer = open_model(name).eval(), open_tokenizer(name)
    stack = resolve_stack(model)
    calibration, unseen = halves(embedded_texts())
    held_out = first_tokens(unseen, tokenizer, held_out_tokens)
    dense = evaluate_model(model, held_out, tokenizer=tokenizer)

    tell.rule("2/6 Score the layers")
    scores = score_layers(
        model, calibration, by=ACTIVATION_SCORES, stack=stack, tokenizer=tokenizer, max_tokens=calibration_tokens
    )
    similarity = docs(model, kinds=("q", "up") if small else None, stack=stack)

    tell.rule("3/6 Draw")
    figures = _draw(similarity, list(scores.values()), folder / "figures")

    tell.rule("4/6 Remove a quarter of the layers by several rules, and measure each on unseen text")
    number = max(1, stack.num_layers // 4)
    plans = _plans(stack, scores, number, seeds=SEEDS[:1] if small else SEEDS)
    measured = {}
    for rule, plan in plans.items():
        with bypassed(stack, plan.remove):
            measured[rule] = evaluate_model(model, held_out, tokenizer=tokenizer, baseline=dense.after)
    best = min(measured, key=lambda rule: measured[rule].loss)

    tell.rule(f"5/6 Save the best ({LABELS.get(best, best)}) and load it again")
    prune_layers(model, plans[best], tokenizer=tokenizer, output_dir=folder / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "pruned").eval()
    after = evaluate_model(reloaded, held_out, tokenizer=tokenizer, baseline=dense.after)
    proof = _compare(stack, plans[best].remove, reloaded, tokenizer, held_out[0])
    proof["perplexity"] = {"measured": measured[best].perplexity, "reloaded": after.perplexity}
    if not proof["same"] or abs(after.loss - measured[best].loss) > 1e-3:
        raise VerificationError(f"The reloaded model is not the one that was measured: {proof}.")

    tell.rule("6/6 Let both write")
    samples = {which: _continue(each, tokenizer, PROMPT) for which, each in (("dense", model), ("pruned", reloaded))}
    results = {
        "model": name,
        "note": note_on(name),
        "stack": stack.path,
        "num_layers": stack.num_layers,
        "calibration": scores["influence"].data,
        "dense": dense.after.to_dict(),
        "rules": [_row(rule, plans[rule].remove, found) for rule, found in measured.items()],
        "best": best,
        "pruned": after.after.to_dict(),
        "proof": proof,
        "samples": samples,
        "figures": [str(figure.relative_to(folder)) for figure in figures],
        "scores": {rule: score.to_dict() for rule, score in scores.items()},
        "docs": similarity.to_dict(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(folder / "results.json", json.dumps(strict(results), indent=2) + "\n")
    return results


def _draw(similarity: SimilarityMatrix, scores: list[LayerScores], folder: Path) -> list[Path]:
    maps = [heat_map(similarity, kind, folder / f"docs_{kind}.png") for kind in similarity.kinds]
    return [
        overview(similarity, scores, folder / "overview.png"),
        depth_plot(scores, folder / "scores_by_depth.png"),
        *maps,
    ]


def _plans(
    stack: LayerStack, scores: dict[str, LayerScores], number: int, *, seeds: tuple[int, ...]
) -> dict[str, PruningPlan]:
    """One plan a rule, from scores that are there already."""
    rules = {rule: scores[rule] for rule in ("avss-published", "avss-relative", "influence")}
    rules["last"] = score_layers(stack.model, by="last", stack=stack)
    for seed in seeds:
        rules[f"random-{seed}"] = score_layers(stack.model, by="random", seed=seed, stack=stack)
    return {
        rule: dataclasses.replace(
            plan_pruning(stack.model, remove=score.least_important(number), stack=stack),
            by=rule,
            scores=score.to_dict(),
        )
        for rule, score in rules.items()
    }


def _compare(stack: LayerStack, removed: tuple[int, ...], reloaded, tokenizer, text: str) -> dict[str, Any]:
    """Whether the reloaded model computes what the original does with those layers bypassed, also from its cache."""
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128, return_token_type_ids=False)
    with torch.no_grad():
        with bypassed(stack, removed):
            expected = stack.model(**inputs, use_cache=False).logits
        found = reloaded(**inputs, use_cache=False).logits
    difference = (expected.float() - found.float()).abs().max().item()
    cached, plain = (_continue(reloaded, tokenizer, PROMPT, use_cache=use_cache) for use_cache in (True, False))
    close = difference <= TOLERANCE[reloaded.dtype] * max(1.0, expected.float().abs().max().item())
    return {
        "max_logit_difference": difference,
        "cached_equals_uncached": cached == plain,
        "same": close and cached == plain,
    }


def _continue(model, tokenizer, prompt: str, *, use_cache: bool = True) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, use_cache=use_cache, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _row(rule: str, removed: tuple[int, ...], found: Comparison) -> dict[str, Any]:
    return {
        "rule": rule,
        "label": LABELS.get(rule, rule),
        "removed": list(removed),
        "perplexity": found.perplexity,
        "perplexity_ratio": found.perplexity_ratio,
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "wrecks_the_model": found.perplexity_ratio >= WRECKED,
    }

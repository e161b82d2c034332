"""What an encoder keeps without a quarter of its layers, plain and repaired: masked-token accuracy of a reaction BERT.

    pip install --no-deps rxnfp==0.1.0
    python tests/benchmarks/repair_encoder.py --layers 3

The 12-layer BERT of the package `rxnfp` reads reactions as SMILES. The reactions here are enumerated from textbook templates;
those that are measured on share no building block with those that choose and repair. One token in seven is masked.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from transformers import BertForMaskedLM

from hf_layerprobe import plan_pruning, prune_layers
from hf_layerprobe.repair import ClosedForm, Finetune

IGNORED, LENGTH = -100, 96
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")
# Radicals, to be bonded at their last atom.
RADICALS = (
    "C", "CC", "CCC", "CC(C)", "CCCC", "CC(C)C", "CCCCC", "C1CC1", "C1CCC1", "C1CCCC1", "C1CCCCC1", "COC", "COCC",
    "CN(C)CC", "FC(F)(F)C", "N#CC", "N#CCC", "C=CC", "C#CC", "ClCC", "c1ccccc1C", "Cc1ccc(C)cc1", "COc1ccc(C)cc1",
    "Fc1ccc(C)cc1", "Clc1ccc(C)cc1", "Brc1ccc(C)cc1", "c1ccncc1C", "c1ccoc1C", "c1ccsc1C", "O1CCOCC1C",
    "CS(=O)(=O)CC", "CC(C)(C)OC(=O)NCC", "C1CCN(C)CC1C", "O=C1CCCN1C", "c1ccc2ccccc2c1C", "CC(=O)CC", "COC(=O)CC",
    "CCOC(=O)CC", "c1ccc(C)cc1OC", "[O-][N+](=O)c1ccc(C)cc1", "CN(C)c1ccc(C)cc1", "FC(F)(F)c1ccc(C)cc1",
    "N#Cc1ccc(C)cc1", "c1ccc(Oc2ccccc2)cc1C", "Cc1nccs1", "C1CCOC1C",
)  # fmt: skip
TEMPLATES = (
    "{a}C(=O)O.N{b}>>{a}C(=O)N{b}",
    "{a}C(=O)Cl.N{b}>>{a}C(=O)N{b}",
    "{a}C(=O)O.O{b}>>{a}C(=O)O{b}",
    "{a}C(=O)OC.O>>{a}C(=O)O",
    "{a}CO.CS(=O)(=O)Cl>>{a}COS(C)(=O)=O",
    "{a}CBr.N{b}>>{a}CN{b}",
    "{a}C=O.N{b}>>{a}CN{b}",
    "{a}S(=O)(=O)Cl.N{b}>>{a}S(=O)(=O)N{b}",
    "{a}N.O=C=N{b}>>{a}NC(=O)N{b}",
    "{a}CO.Br{b}>>{a}CO{b}",
)


def reactions(number: int, *, held_out: bool, seed: int = 0) -> list[str]:
    """Reactions of two radicals that both are, or both are not, kept for evaluation."""
    draw = random.Random(seed)
    radicals = [each for i, each in enumerate(RADICALS) if (i % 3 == 2) == held_out]
    # The first radical is written backwards: its last atom is the one that is bonded, the second's too.
    rows = [t.format(a=a, b=b) for t, a, b in product(TEMPLATES, radicals, [f"C{each}" for each in radicals])]
    rows = list(dict.fromkeys(rows))
    draw.shuffle(rows)
    return rows[:number]


def masked(rows: list[str], vocabulary: dict[str, int], *, seed: int, batch_size: int = 32) -> list[dict]:
    """Batches with one token in seven masked; `labels` are what was there."""
    generator = torch.Generator().manual_seed(seed)
    unknown = vocabulary["[UNK]"]
    ids = [
        [vocabulary["[CLS]"], *(vocabulary.get(each, unknown) for each in TOKEN.findall(row)), vocabulary["[SEP]"]]
        for row in rows
    ]
    ids = sorted((row for row in ids if len(row) <= LENGTH), key=len)
    batches = []
    for first in range(0, len(ids), batch_size):
        group = ids[first : first + batch_size]
        longest = max(map(len, group))
        inputs = torch.tensor([[*row, *[vocabulary["[PAD]"]] * (longest - len(row))] for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group])
        inner = mask.bool() & (inputs != vocabulary["[CLS]"]) & (inputs != vocabulary["[SEP]"])
        chosen = inner & (torch.rand(inputs.shape, generator=generator) < 1 / 7)
        labels = torch.where(chosen, inputs, IGNORED)
        inputs = torch.where(chosen, vocabulary["[MASK]"], inputs)
        batches.append({"input_ids": inputs, "attention_mask": mask, "labels": labels})
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


@torch.no_grad()
def accuracy(model, batches: list[dict]) -> float:
    right = total = 0
    for batch in batches:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        counted = batch["labels"] != IGNORED
        right += int((found == batch["labels"])[counted].sum())
        total += int(counted.sum())
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="how many of the 12 layers go")
    parser.add_argument("--reactions", type=int, default=2000, help="to choose and repair with")
    parser.add_argument("--rules", default="influence,cka,docs,last")
    asked = parser.parse_args()
    folder = Path(find_spec("rxnfp").submodule_search_locations[0]) / "models/transformers/bert_pretrained"
    vocabulary = {token: i for i, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
    model = BertForMaskedLM.from_pretrained(folder).eval()
    known = masked(reactions(asked.reactions, held_out=False), vocabulary, seed=0)
    unseen = masked(reactions(600, held_out=True), vocabulary, seed=1)
    dense = accuracy(model, unseen)
    print(
        f"12 layers: masked accuracy {dense:.3f} on {sum(int((b['labels'] != IGNORED).sum()) for b in unseen)} tokens"
    )
    print("| rule | layers removed | repair | masked accuracy | kept | seconds |\n|---|---|---|---:|---:|---:|")
    for by in asked.rules.split(","):
        data = None if by in ("docs", "last") else known[:16]
        plan = plan_pruning(model, data, num_layers=asked.layers, by=by)
        for repair in (None, ClosedForm(), Finetune(batch_size=32)):
            started = time.monotonic()
            pruned = prune_layers(model, plan, data=known if repair else None, repair=repair).eval()
            found, seconds = accuracy(pruned, unseen), time.monotonic() - started
            name = "none" if repair is None else repair.name
            removed = ", ".join(map(str, plan.remove))
            print(f"| {by} | {removed} | {name} | {found:.3f} | {found / dense:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

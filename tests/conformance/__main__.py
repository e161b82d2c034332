"""Tries every model type of the installed Transformers: `python -m tests.conformance [--write | --if-changed] [--processes 2]`.

Without `--write` it compares what it finds with `hf_layerprobe/supported_models.json`, which nothing else may write, and
fails on a difference. It always fails on a model that reloads as another function and on an exception that is not a
refusal. Interrupted, it goes on where it was when it is started again, unless any code has changed since. With
`--if-changed` nothing is tried where the list was written by the very code and versions that are here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from hf_layerprobe import supported

from .pool import run
from .trial import try_type
from .types import model_types

BAD = ("wrong", "crashed")
README = Path(__file__).parents[2] / "README.md"
START, END = (
    "<!-- supported models: written by python -m tests.conformance --write -->",
    "<!-- end of supported models -->",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="these types only; nothing is written or compared")
    parser.add_argument("--write", action="store_true", help="write the list of supported models")
    parser.add_argument("--if-changed", action="store_true", help="only where the list is by other code or versions")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.if_changed and supported.read().get("code") == fingerprint():
        return 0
    if arguments.types:
        found = run(arguments.types, arguments.processes, try_type)
        print(json.dumps(found, indent=1))
    else:
        journal = Path(tempfile.gettempdir(), f"conformance-{fingerprint()}.jsonl")
        found = run(list(model_types()), arguments.processes, try_type, journal)
        print(supported.table(found))
    bad = {name: record for name, record in found.items() if record["outcome"] in BAD}
    for name, record in bad.items():
        print(f"{name}: {json.dumps(record)}", file=sys.stderr)
    if bad:
        return 1
    if arguments.types:
        return 0
    journal.unlink()
    if arguments.write:
        supported.write(found, fingerprint())
        write_table(supported.table(found))
        return 0
    return differs(found)


def fingerprint() -> str:
    """Of the code that finds layers, removes them and judges the result."""
    here = Path(__file__).parent
    library = here.parents[1] / "hf_layerprobe"
    content = hashlib.sha256(json.dumps(supported.versions()).encode())
    parts = (library.glob(pattern) for pattern in ("stacks/*.py", "surgery/**/*.py", "prune.py"))
    judges = (file for file in here.glob("*.py") if file.name != "refute.py")  # which reads the list
    for file in sorted([*judges, *chain.from_iterable(parts)]):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def write_table(table: str) -> None:
    """Puts the summary between the marks in the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START, 1)
    README.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def outcomes(record: dict[str, Any] | None) -> Any:
    """What a record says without the wording of its reasons."""
    if record is None:
        return None
    sets = [{kept: outcome.split(":")[0] for kept, outcome in stack["sets"].items()} for stack in record["stacks"]]
    return record["class"], record["outcome"], sets


def differs(found: dict[str, dict[str, Any]]) -> int:
    """Whether the stored list says something else; says where."""
    stored = supported.read()
    if stored["versions"] != supported.versions():
        print(f"the list was written with {stored['versions']}, here are {supported.versions()}", file=sys.stderr)
        return 1
    every = sorted({*found, *stored["types"]})
    names = [name for name in every if outcomes(found.get(name)) != outcomes(stored["types"].get(name))]
    for name in names:
        print(f"{name}: found {found.get(name)}\n  stored {stored['types'].get(name)}", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())

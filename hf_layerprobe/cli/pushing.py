"""`push`: the folder of a model, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a model, such as `prune --output` wrote it.")],
    repo_id: Annotated[str, typer.Argument(help="`user/name` on the Hub; created when it does not exist.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="For a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; created when it does not exist.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Replace another model in that repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make all checks and list the files, but send none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a model to the Hub in one commit; run it again to resume.

    The token is the one of `hf auth login`, or HF_TOKEN.

    Examples:

    - `hf-layerprobe push smaller me/smaller --dry-run`

    - `hf-layerprobe push smaller me/smaller --private`
    """
    from .. import PruningPlan, push_model
    from ..hub import PLAN_FILE
    from .outputs import show_json, show_table

    if message is None and (folder / PLAN_FILE).is_file():
        parts = PruningPlan.load(folder).parts
        each = [f"{list(part.remove)}{f' of {part.stack}' if len(parts) > 1 else ''}" for part in parts]
        message = f"Remove layers {' and '.join(each)}"
    sent = push_model(
        folder, repo_id, private=private, revision=revision, commit_message=message, exist_ok=exist_ok, dry_run=dry_run
    )
    if as_json:
        return show_json(vars(sent))
    rows = [(name, f"{size:,}") for name, size in sent.files.items()] + [(name, "deleted") for name in sent.delete]
    verb = "Would be sent" if dry_run else "Sent"
    show_table(
        f"{verb} to {sent.repo_id} ({sent.revision})", ("file", "bytes"), [*rows, ("", f"{sum(sent.files.values()):,}")]
    )
    if sent.url:
        typer.echo(sent.url)

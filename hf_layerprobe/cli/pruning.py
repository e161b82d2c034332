"""`plan` and `prune`: which layers go, and the model without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LayerProbeError, VerificationError
from .options import (
    DEFAULT_MODEL,
    MAX_TOKENS,
    By,
    Column,
    Json,
    Keep,
    MaxTokens,
    Model,
    NumLayers,
    Ratio,
    Remove,
    Stack,
    TextFile,
)


def plan(
    model: Model = DEFAULT_MODEL,
    by: By = "auto",
    ratio: Ratio = None,
    num_layers: NumLayers = None,
    remove: Remove = None,
    keep: Keep = None,
    output: Annotated[Path | None, typer.Option(help="Write the plan to this file, for `prune --plan`.")] = None,
    text: TextFile = None,
    column: Column = "text",
    max_tokens: MaxTokens = MAX_TOKENS,
    stack: Stack = None,
    as_json: Json = False,
) -> None:
    """Decide which layers to remove, without removing them.

    Say how much by one of --ratio, --num-layers, --remove and --keep. Of the texts, every other one is used; the rest
    stays unseen, so that `prune` can measure on it.

    Examples:

    - `hf-layerprobe plan --ratio 0.25`

    - `hf-layerprobe plan ./my-model --by influence --num-layers 4 --text corpus.txt --output plan.json`
    """
    from .inputs import note_on, open_model
    from .outputs import ranges, show_table

    made = _make_plan(
        model, open_model(model), text, column, by=by, ratio=ratio, num_layers=num_layers, remove=remove, keep=keep,
        max_tokens=max_tokens, stack=stack,
    )  # fmt: skip
    if output is not None:
        made.save(output)
    if as_json:
        return typer.echo(made.to_json(), nl=False)  # as in a plan's file
    rows = [
        (candidate["by"], ranges(candidate["remove"]), f"{candidate['held_out_loss']:.3f}")
        for candidate in made.candidates
    ]
    title = f"Remove {len(made.remove)} of {made.num_layers} layers of {made.stack} by {made.by}"
    if rows:
        show_table(f"{title}, the best of", ("rule", "removes", "loss on other text (nats)"), rows, note_on(model))
    show_table(title, ("", "layers"), [("remove", ranges(made.remove)), ("keep", ranges(made.keep))])
    if output is not None:
        typer.echo(f"Plan written to {output}")


def prune(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="A new or empty folder for the pruned model.")],
    model: Model = DEFAULT_MODEL,
    plan_file: Annotated[
        str | None,
        typer.Option("--plan", help="A plan: a file of `plan --output`, a pruned model's folder, or its Hub id."),
    ] = None,
    by: By = "auto",
    ratio: Ratio = None,
    num_layers: NumLayers = None,
    remove: Remove = None,
    keep: Keep = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(min=0, help="Keep no model whose mean token loss rises by more than this share; 0.2 is 20 %."),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="Bring the pruned model back towards the original: `closed-form` (no training), `lora` or `finetune`. Kept "
            "only if the loss on text that it was not fitted to improves."
        ),
    ] = None,
    text: TextFile = None,
    column: Column = "text",
    max_tokens: MaxTokens = MAX_TOKENS,
    stack: Stack = None,
    as_json: Json = False,
) -> None:
    """Remove layers and save a smaller, plain Transformers model.

    The saved model is loaded again and compared with the original whose removed layers are bypassed; if they differ, or
    if --max-loss-increase is exceeded, nothing is left in the output folder and the exit code is 1. The loss is that of
    the final model on every other text; plans are made from the rest, and repairs fitted to it.

    Examples:

    - `hf-layerprobe prune --ratio 0.1 --output smaller`

    - `hf-layerprobe prune ./my-model --remove 20,21 --output smaller --max-loss-increase 0.2 --text corpus.txt`

    - `hf-layerprobe prune ./my-model --plan plan.json --output smaller`

    - `hf-layerprobe prune --num-layers 7 --repair closed-form --output smaller`

    - `hf-layerprobe prune org/model --plan someone/their-pruned-model --output smaller`
    """
    from .. import PruningPlan, prune_layers
    from ..files import check_new_folder, new_folder
    from ..repair import repair_config
    from .inputs import halves, note_on, open_model, read_texts
    from .outputs import number, removed, show_json, show_table, stacks

    check_new_folder(output)
    if repair is not None:
        repair_config(repair)
    if plan_file is not None:
        ignored = ["by", "ratio", "num_layers", "remove", "keep", "stack"]
        if max_loss_increase is None:
            ignored += ["max_tokens"]  # only read to measure the loss
            ignored += ["text", "column"] if repair is None else []
        given = [name for name in ignored if context.get_parameter_source(name).name != "DEFAULT"]
        if given:
            raise typer.BadParameter(
                f"a plan says what to remove; leave out {', '.join('--' + name.replace('_', '-') for name in given)}.",
                param_hint="--plan",
            )
    given_plan = PruningPlan.from_pretrained(plan_file) if plan_file is not None else None  # before the model is loaded
    loaded = open_model(model)
    chosen = given_plan
    if chosen is None:
        chosen = _make_plan(
            model, loaded, text, column, by=by, ratio=ratio, num_layers=num_layers, remove=remove, keep=keep,
            max_tokens=max_tokens, stack=stack,
        )  # fmt: skip
    processor, measured = _processor_if_any(model), None
    calibration = halves(read_texts(text, column))[0] if repair is not None else None
    with new_folder(output) as folder:  # so that a model that fails the check leaves nothing
        pruned = prune_layers(loaded, chosen, tokenizer=processor, output_dir=folder, repair=repair, data=calibration)
        if max_loss_increase is not None:
            measured = _check_loss(model, loaded, pruned, chosen, text, column, max_tokens, max_loss_increase)
        done = PruningPlan.load(folder).repair
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (loaded, pruned)]
    note = note_on(model)
    if as_json:
        return show_json(
            {
                "output": str(output),
                "remove": chosen.remove,
                "keep": chosen.keep,
                "by": chosen.by,
                "stacks": stacks(chosen),
                "parameters": {"before": sizes[0], "after": sizes[1]},
                "loss": measured,
                "repair": done or None,
                "note": note,
            }
        )
    rows = [
        *((f"layers of {part.stack}", str(part.num_layers), str(len(part.keep))) for part in chosen.parts),
        ("parameters", f"{sizes[0]:,}", f"{sizes[1]:,}"),
    ]
    if measured:
        rows.append(("token loss, nats", number(measured["before"]), number(measured["after"])))
    if done:
        losses = done["held_out_loss"]
        rows.append(("repair, held-out loss", number(losses["pruned"]), number(losses["repaired"])))
    title = f"Removed {removed(chosen)} by {chosen.by}; verified"
    if done:
        title += f"; {repair} repair {'kept' if done['kept'] else 'undone, since the loss did not improve'}"
    show_table(title, ("", "before", "after"), rows, note)
    typer.echo(f"Model written to {output}")


def _make_plan(name, model, text, column, *, by, remove, keep, max_tokens, **request):
    """A plan from the options; text is read only for rules that need it."""
    from .. import plan_pruning
    from ..scores.registry import SCORES
    from ..scores.run import ALIASES
    from .inputs import halves, layer_list, open_tokenizer, read_texts

    remove, keep = layer_list(remove, "--remove"), layer_list(keep, "--keep")
    score = SCORES.get(ALIASES.get(by, by))  # None for a search, which needs text
    if remove is None and keep is None and (score is None or score.needs_data):
        calibration, _ = halves(read_texts(text, column))
        request.update(data=calibration, tokenizer=open_tokenizer(name), max_tokens=max_tokens)
    return plan_pruning(model, by=by, remove=remove, keep=keep, **request)


def _check_loss(name, model, pruned, plan, text, column, max_tokens, limit) -> dict[str, float]:
    """Mean token loss before and after, on text that neither plan nor repair has seen."""
    from .. import evaluate_model
    from .inputs import first_tokens, halves, open_tokenizer, read_texts
    from .outputs import removed

    tokenizer = open_tokenizer(name)
    texts = first_tokens(halves(read_texts(text, column))[1], tokenizer, max_tokens)
    found = evaluate_model(pruned, texts, tokenizer=tokenizer, baseline=model)
    before, after = found.before.loss, found.after.loss
    increase = after / before - 1
    if not increase <= limit:
        raise VerificationError(
            f"Without layers {removed(plan)} the mean token loss rises from {before:.3f} to {after:.3f} nats, by "
            f"{increase:.1%}; --max-loss-increase allows {limit:.1%}. No model was kept. Remove fewer layers, or choose "
            "them by another rule."
        )
    return {"before": before, "after": after, "increase": increase}


def _processor_if_any(name: str):
    """What a model's inputs are made with: a processor (images, sound), a tokenizer, or None."""
    from .inputs import open_processor, open_tokenizer

    for opened in (open_processor, open_tokenizer):
        try:
            return opened(name)
        except (LayerProbeError, ImportError):  # a processor may want torchvision
            continue
    typer.echo(f"{name} has no tokenizer that can be loaded; the pruned model is saved without one.", err=True)
    return None

"""`prune_layers`: from a model and a plan to a smaller, plain Transformers model, in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .errors import LayerProbeError, PruningError
from .files import check_new_folder, new_folder
from .hub import check_push, push_model
from .loading import load_model
from .plan import PruningPlan, plan_pruning, refuse_options, to_carry_out
from .repair import repair_config, repair_model
from .stacks import LayerStack, resolve_stack
from .stacks.adapters import base_of, is_peft_model
from .surgery.adapters import each_adapter, load_adapters, save_adapters, with_adapters, without_adapters
from .surgery.build import build_pruned, own_tensors
from .surgery.gate import verify as verify_pruned
from .surgery.prunable import check_prunable, check_savable

if TYPE_CHECKING:
    from peft import PeftModel


def prune_layers(
    model: PreTrainedModel | PeftModel | str | Path,
    plan: PruningPlan | str | Path | None = None,
    *,
    remove: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    keep: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    ratio: float | None = None,
    num_layers: int | None = None,
    by: str = "auto",
    data: Any = None,
    stack: str | LayerStack | Sequence[str | LayerStack] | None = None,
    tokenizer=None,
    output_dir: str | Path | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    verify: bool = True,
    repair: Any = None,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Removes layers and returns a smaller, plain model of the same class; the given model is left as it was.

    Args:
        model: A model, or a folder or Hub id to load one from. The adapters of a `PeftModel` go along with their layers, into
            `output_dir/adapters/NAME`; those that are part of the model (`merge_and_unload()`) are pruned with it.
        plan: A plan from [`plan_pruning`], or the file, folder or Hub id of one; else the arguments of that function say what
            to remove.
        remove: Layers to remove (0-based), or a dict of them by stack: `{"encoder.block": [1], "decoder.block": [2]}`.
        keep: Layers to keep (0-based), or a dict of them.
        ratio: Share of the layers to remove.
        num_layers: Number of layers to remove.
        by: The rule that chooses them.
        data: Calibration data for the rule and the repair.
        stack: Path of the stack; the main one by default.
        tokenizer: For texts in `data`; also saved into `output_dir` when given.
        output_dir: A new or empty folder for the model: config, safetensors, generation config, tokenizer, plan and model card.
            Written beside it and renamed when whole and verified.
        push_to_hub: Upload that folder to the Hub in one commit, see [`push_model`]; needs `repo_id` and `output_dir`. What
            would make it fail is looked for first. When it fails, the folder stays, and `push_model` resumes.
        repo_id: `"user/name"` on the Hub.
        private: Whether a new repository is private.
        revision: The branch to push to, `main` by default.
        token: The token for the Hub, for loading and pushing; by default the one of `hf auth login` or `HF_TOKEN`.
        verify: Check that the model (reloaded from the folder, if there is one) computes what the original does with the
            removed layers bypassed, and that it generates the same with its cache as without.
        repair: How to bring the pruned model back towards the original, with `data`: `"closed-form"` (training-free),
            `"lora"`, `"finetune"`, or settings such as `Lora(minutes=30)`; see [`repair_model`]. Done after the check, and undone where the loss
            on held-out data does not improve; the plan in `output_dir` records it.
        options: Options of [`score_layers`] for the rule.

    Returns:
        The pruned model, on the original's device, in its dtype and mode.

    Raises:
        PruningError: The kept set cannot be expressed, or the check failed; nothing is left in `output_dir`.
        LayerProbeError: Unusable input, or arguments that would have no effect.
        HubError: The push cannot or did not succeed.
    """
    if repair is not None:
        repair = repair_config(repair)
        if data is None:
            raise LayerProbeError("A repair is fitted to data: pass data= (and tokenizer= for texts).")
        if isinstance(data, Iterator):  # the rule would use it up
            raise LayerProbeError(
                f"data is a {type(data).__name__}, which can be read once, but the rule and the repair of each stack read it. Pass "
                "a list: data=list(data)."
            )
    if push_to_hub and not (repo_id and output_dir):
        raise LayerProbeError("push_to_hub=True needs repo_id= ('user/name') and output_dir= (the folder to upload).")
    if output_dir is not None:
        check_new_folder(Path(output_dir))
    if push_to_hub:
        repo_id = check_push(repo_id, revision=revision, token=token).repo_id  # with the account, for cards and configs
    elif given := [
        name
        for name, value in (("private", private), ("revision", revision), ("repo_id", repo_id))
        if value is not None
    ]:
        raise LayerProbeError(f"{', '.join(given)} would have no effect without push_to_hub=True.")
    if isinstance(model, (str, Path)):
        model = load_model(model, token=token)
    check_prunable(model)
    if output_dir is not None:
        check_savable(model)
    if plan is None:
        plan = plan_pruning(
            model, data, ratio=ratio, num_layers=num_layers, remove=remove, keep=keep, by=by, stack=stack,
            tokenizer=tokenizer, **options,
        )  # fmt: skip
    elif any(value is not None for value in (ratio, num_layers, remove, keep)):
        raise PruningError("Pass a plan, or say what to remove; not both.")
    else:
        given = {"by": by if by != "auto" else None, "data": None if repair else data, "stack": stack}
        given = {name: value for name, value in given.items() if value is not None}
        refuse_options({**given, **options}, "the plan says what to remove")
        plan = to_carry_out(plan, token=token)
    adapted = model if is_peft_model(model) else None
    if adapted and repair is not None:
        raise PruningError(
            "A repair changes the weights under the adapters, which were trained for others. Merge them first "
            "(`model = model.merge_and_unload()`), or leave repair= out."
        )
    plain = without_adapters(adapted) if adapted else model
    kept, removed = {}, {}
    for part in plan.parts:
        found = resolve_stack(model, part.stack)
        part.check_fits(found)
        kept[resolve_stack(plain, part.stack)], removed[found] = part.keep, part.remove
    pruned = build_pruned(kept)
    if output_dir is None:
        pruned = with_adapters(adapted, pruned, kept) if adapted else pruned
        if verify:
            _verify(adapted, removed, pruned)
        own_tensors(pruned)
        if repair is not None:
            _repair(pruned, model, plan, data, repair, tokenizer)
    else:
        from .report import write_card  # matplotlib is slow to import

        with new_folder(Path(output_dir)) as folder:
            _save(pruned, folder, plan, tokenizer)
            if adapted:
                pruned = with_adapters(adapted, pruned, kept)
                save_adapters(pruned, folder, repo_id)
            if verify:
                reloaded = (
                    type(plain).from_pretrained(folder, dtype=plain.dtype, local_files_only=True).to(plain.device)
                )
                if adapted:
                    reloaded = load_adapters(reloaded, folder, list(adapted.peft_config))
                _verify(adapted, removed, reloaded)
                del reloaded
            own_tensors(pruned)
            if repair is not None:
                plan = _repair(pruned, model, plan, data, repair, tokenizer)
                _save(pruned, folder, plan, tokenizer)
            write_card(folder, plain, repo_id)
    if push_to_hub:
        push_model(
            output_dir, repo_id, private=private, revision=revision, token=token,
            commit_message=_message(plan),
        )  # fmt: skip
    return pruned


def _verify(adapted: PeftModel | None, removed: Mapping[LayerStack, Sequence[int]], pruned: nn.Module) -> None:
    """The gate, for each adapter in turn if there are some."""
    if adapted is None:
        return verify_pruned(removed, pruned)
    for _ in each_adapter(adapted, pruned):
        verify_pruned(removed, base_of(pruned))


def _repair(pruned: PreTrainedModel, model: PreTrainedModel, plan: PruningPlan, data, repair, tokenizer) -> PruningPlan:
    """Repairs each stack, and returns the plan with a record of it."""
    parts = [
        replace(
            part,
            repair=repair_model(pruned, model, part.keep, data, repair=repair, stack=part.stack, tokenizer=tokenizer),
        )
        for part in plan.parts
    ]
    return replace(parts[0], also=tuple(parts[1:]))


def _message(plan: PruningPlan) -> str:
    parts = [(list(part.remove), part.stack) for part in plan.parts]
    return f"Remove layers {', '.join(str(r) if len(parts) == 1 else f'{r} of {path}' for r, path in parts)}"


def _save(pruned: PreTrainedModel, folder: Path, plan: PruningPlan, tokenizer) -> None:
    pruned.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    plan.save(folder)

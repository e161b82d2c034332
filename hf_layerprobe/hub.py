"""The Hugging Face Hub: a folder goes out in one commit, a file comes in, and failures say what to do about them.

All traffic is `huggingface_hub`'s. The token is handed to it and to nothing else: no message or file has it.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .errors import HubError, LayerProbeError

PLAN_FILE = "pruning_plan.json"
# What a loader could take for the model, or for a part of it.
MODEL_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.h5", "*.msgpack", "adapter_config.json")
# Connection errors are those of httpx or httpx2, by the version of huggingface_hub; failed uploads are RuntimeErrors.
FAILURES = (HfHubHTTPError.__bases__[0], EntryNotFoundError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Push:
    """What was sent to the Hub, or would be.

    Attributes:
        repo_id: `"user/name"`.
        revision: The branch.
        files: Size in bytes of each file of the commit, by its path in the repository.
        delete: Files of another model that the commit removes.
        url: The commit's page; None after a dry run.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    delete: tuple[str, ...] = ()
    url: str | None = None


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    exist_ok: bool = False,
    dry_run: bool = False,
) -> Push:
    """Uploads the folder of a model to the Hub in one commit; the parameters mean what they mean in `push_to_hub`.

    A failed push leaves no commit (a repository that it created stays, empty). To resume it, push again: what has arrived
    is not sent twice.

    Args:
        folder: A folder written by [`prune_layers`] or `save_pretrained`; hidden files in it are not sent.
        repo_id: `"user/name"`, or `"name"` for the token's own account. Created when it does not exist.
        private: Whether a new repository is private; by default what the account's settings say.
        revision: The branch to push to, `main` by default; created when it does not exist.
        token: The token, or None for the one of `hf auth login` or `HF_TOKEN`.
        commit_message: `"Upload model"` by default.
        exist_ok: Replace another model that is in the repository: its weights are removed in the same commit.
        dry_run: Make the checks, send nothing, and return what would be sent.

    Raises:
        LayerProbeError: The folder holds no model, or is none.
        HubError: No or a wrong token, no permission to write, a repository that holds another model, an invalid model
            card, no connection, or a repository that was changed meanwhile.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise LayerProbeError(
            f"folder is a {type(folder).__name__}; expected the folder of a saved model. Save it first "
            "(model.save_pretrained(folder), or prune_layers(..., output_dir=folder)), and push that folder."
        )
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
    if "config.json" not in files or not any(_is_model_file(name) for name in files):
        raise LayerProbeError(
            f"{folder} holds no model: expected config.json and weights, found {sorted(files) or 'nothing'}."
        )
    access = check_push(repo_id, revision=revision, token=token, folder=folder, exist_ok=exist_ok)
    stale = tuple(name for name in access.files if _is_model_file(name) and name not in files)
    push = Push(access.repo_id, revision or "main", {name: path.stat().st_size for name, path in files.items()}, stale)
    if dry_run:
        return push
    api = _api()
    with _explained(f"push {folder} to", access.repo_id):
        api.create_repo(access.repo_id, private=private, token=token, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(access.repo_id, branch=revision, token=token, exist_ok=True)
        # Only if nobody has pushed since the check. `upload_folder` would split large folders into several commits.
        head = (
            api.model_info(access.repo_id, revision=revision, token=token).sha if access.head is None else access.head
        )
        commit = api.create_commit(
            access.repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=commit_message or "Upload model",
            revision=revision,
            token=token,
            parent_commit=head,
        )
    return Push(**{**vars(push), "url": commit.commit_url})


@dataclass(frozen=True)
class Access:
    """What is at the place that a push goes to: the full id, the branch's commit if it exists, and its files."""

    repo_id: str
    head: str | None = None
    files: tuple[str, ...] = ()


def check_push(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    folder: Path | None = None,
    exist_ok: bool = False,
) -> Access:
    """Whether a push could succeed, without writing anything: made before any heavy work.

    Raises:
        HubError: See [`push_model`].
    """
    check_token(token)
    api = _api()
    with _explained("push to", repo_id):
        validate_repo_id(repo_id)
        account = api.whoami(token=token)
        owners = {account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))}
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read" or repo_id.split("/")[0] not in owners:
            why = "may only read" if role == "read" else f"belongs to {', '.join(sorted(owners))}"
            raise HubError(
                f"The token has no permission to write to {repo_id!r}: it {why}. Make a token with write permission at "
                "https://huggingface.co/settings/tokens, or push to an account of yours. Nothing was sent."
            )
        access = _look(api, repo_id, revision, token)
        others = [name for name in sorted(access.files) if _is_model_file(name)]
        new_branch = access.head is None  # what is on main stays there
        if others and not new_branch and not exist_ok and not _holds_same_plan(access, folder, token):
            raise HubError(
                f"The repository {repo_id!r} exists and holds another model ({', '.join(others[:3])}"
                f"{', …' if len(others) > 3 else ''}). Push under another repo_id or to another revision (branch), or "
                "replace that model: `push_model(folder, repo_id, exist_ok=True)`, `hf-layerprobe push --exist-ok`. "
                "Nothing was sent."
            )
    return access


def fetch_file(repo_id: str, name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A file of a model repository on the Hub, or from the cache of an earlier download.

    Raises:
        HubError: No such repository, revision or file, no access to it, or no connection and nothing in the cache.
    """
    check_token(token)
    with _explained(f"read {name} of", repo_id):
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))


def is_repo_id(name: str) -> bool:
    """Whether a name is written like a Hub id; it says nothing about whether there is one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def was_downloaded(name: str) -> bool:
    """Whether a name is that of a model in the cache of the Hub, and no path that looks like one."""
    if not is_repo_id(name) or Path(name).exists():
        return False
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def _api() -> HfApi:
    return HfApi(library_name="hf-layerprobe", library_version=__version__)


def check_token(token: Any) -> None:
    """Refuses a token that cannot be sent, which the HTTP library would quote in its complaint about the header.

    Raises:
        HubError: The token, or the stored one where that would be sent, is none. It is not quoted.
    """
    if token is None or token is True:
        fits = constants.HF_HUB_OFFLINE or _stored_is_token()
        names = (name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name))
        what, remedy = next(names, constants.HF_TOKEN_PATH), " Correct it, or remove it and run `hf auth login`."
    else:
        fits = token is False or (isinstance(token, str) and _is_token(token))
        what, remedy = "token=", ""
    if not fits:
        raise HubError(
            f"{what} is not a token: expected plain characters without spaces and line breaks, such as hf_… .{remedy}"
        )


def _is_token(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _stored_is_token() -> bool:
    try:
        stored = get_token()
    except UnicodeDecodeError:  # a file that is no text
        return False
    return stored is None or _is_token(stored)


def _is_model_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)


def _look(api: HfApi, repo_id: str, revision: str | None, token: str | bool | None) -> Access:
    try:
        try:
            info = api.model_info(repo_id, revision=revision, token=token)
        except RevisionNotFoundError:  # the branch will start from main, with its files
            info = api.model_info(repo_id, token=token)
            return Access(repo_id, None, tuple(file.rfilename for file in info.siblings or ()))
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return Access(repo_id)
    return Access(repo_id, info.sha, tuple(file.rfilename for file in info.siblings or ()))


def _holds_same_plan(access: Access, folder: Path | None, token: str | bool | None) -> bool:
    """Whether the repository is an earlier push of this model; before there is a folder, of any pruned model."""
    if PLAN_FILE not in access.files:
        return False
    if folder is None:
        return True
    remote = hf_hub_download(access.repo_id, PLAN_FILE, revision=access.head, token=token)
    local = folder / PLAN_FILE
    return local.is_file() and local.read_bytes() == Path(remote).read_bytes()


@contextmanager
def _explained(doing: str, repo_id: str) -> Iterator[None]:
    """Turns what the Hub and its client raise into one error that says what to do."""
    try:
        yield
    except LayerProbeError:
        raise
    except FAILURES as error:
        raise HubError(f"Cannot {doing} {repo_id!r}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__  # what a failed upload, or a file that is not in the cache either, failed of
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = getattr(error, "server_message", None) or str(error).strip()
    if isinstance(error, LocalTokenNotFoundError):
        return "no token was found. Run `hf auth login`, set HF_TOKEN, or pass token=."
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on, and the cache does not have it. Unset HF_HUB_OFFLINE."
    if isinstance(error, HFValidationError):
        return "that is no Hub id; expected 'user/name' of letters, digits, '-', '_' and '.'."
    if isinstance(error, GatedRepoError):
        return "the repository is gated. Ask for access on its page, and use a token of the account that has it."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision (branch, tag or commit)."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token may not read it."
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file."
    if status == 401:
        return "the Hub does not accept the token (mistyped, expired or revoked)."
    if status == 403:
        return f"the token has no permission for that ({said}). Nothing was committed."
    if status in (409, 412):
        return f"the repository was changed meanwhile ({said}). Nothing was committed; look at what is there, then push again."
    if isinstance(error, ValueError):  # a refused model card, among others
        return f"{said}. Nothing was committed."
    return f"the connection failed ({type(error).__name__}: {said}). Try again; what has arrived is not sent twice."

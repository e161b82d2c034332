"""Outputs are written beside their place and renamed when whole, so that a failure leaves what was there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LayerProbeError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8), replacing an older one only when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_new_folder(path: Path) -> None:
    """Refuses a path that cannot become a new folder, before any work.

    Raises:
        LayerProbeError: It exists and is a file, or a folder with something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LayerProbeError(f"{path} exists and is not an empty folder; nothing was written. Name another place.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the context ends without an exception, and vanishes otherwise.

    Where `path` is an empty folder, what is in the temporary one is moved there: the folder may be where the user is, or a
    mount, which cannot be replaced.
    """
    check_new_folder(path)
    path = path.resolve()  # a link is not renamed over
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = path.exists()
    temporary = Path(tempfile.mkdtemp(dir=path if exists else path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        # mkdtemp and safetensors make what they write private.
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        if exists:
            for file in sorted(
                temporary.iterdir(), key=lambda file: file.name == "config.json"
            ):  # last: then it is whole
                file.rename(path / file.name)
            temporary.rmdir()
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

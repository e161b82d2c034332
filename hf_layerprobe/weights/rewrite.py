"""Copies a safetensors file with some tensors left out and others renamed, byte by byte, without reading it into memory.

The format is a length (8 bytes, little endian), a JSON header with each tensor's dtype, shape and place, and the bytes.
`safetensors` itself writes from tensors only, which would map the whole file into memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LayerProbeError

# Some writers align the first tensor to this many bytes by spaces after the header.
ALIGNMENT = 8
CHUNK = 64 * 1024**2


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin.

    Raises:
        LayerProbeError: Not such a file, or one that is cut short.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < path.stat().st_size:
                raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes by its header, {path.stat().st_size} in the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LayerProbeError(
            f"{path} is no whole safetensors file ({error}); save or download the checkpoint again."
        ) from error
    return header, 8 + length


def rewrite(source: Path, target: Path, new_name: Callable[[str], str | None]) -> dict[str, int]:
    """Writes those tensors of a file for which `new_name` gives a name, in the order that they have.

    Args:
        source: The safetensors file.
        target: The file to write.
        new_name: The name of a tensor in the new file, or None to leave it out.

    Returns:
        Bytes of each tensor by its new name; where it is empty, no file was written.

    Raises:
        LayerProbeError: `source` is damaged.
    """
    header, begin = read_header(source)
    metadata = _renamed(header.pop("__metadata__", None), new_name)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    kept = [(name, entry) for old, entry in entries if (name := new_name(old)) is not None]
    if not kept:
        return {}
    new_header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    ranges, at = [], 0
    for name, entry in kept:
        first, last = entry["data_offsets"]
        new_header[name] = {**entry, "data_offsets": [at, at + last - first]}
        at += last - first
        if ranges and ranges[-1][1] == begin + first:
            ranges[-1][1] = begin + last
        else:
            ranges.append([begin + first, begin + last])
    text = json.dumps(new_header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with source.open("rb") as old, target.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        new.flush()
        for first, last in ranges:
            _copy(old.fileno(), new.fileno(), first, last)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in kept}


def _renamed(metadata: dict[str, str] | None, new_name: Callable[[str], str | None]) -> dict[str, str] | None:
    """The metadata under the tensors' new names: torchao keeps there what type each has, and a list of them."""
    if metadata is None:
        return None
    metadata = {name: value for old, value in metadata.items() if (name := new_name(old)) is not None}
    if names := metadata.get("tensor_names"):
        new_names = [name for old in json.loads(names) if (name := new_name(old)) is not None]
        metadata["tensor_names"] = json.dumps(new_names)
    return metadata


def _copy(source: int, target: int, first: int, last: int) -> None:
    """Appends bytes of one file to another; in the kernel, where the system can."""
    while first < last:
        if hasattr(os, "sendfile") and os.uname().sysname == "Linux":
            done = os.sendfile(target, source, first, last - first)
        else:
            done = os.write(target, os.pread(source, min(CHUNK, last - first), first))
        if not done:
            raise LayerProbeError("A safetensors file became shorter while it was copied.")
        first += done

"""The safetensors files of a checkpoint: which tensor is in which file, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash

from ..errors import LayerProbeError

# Formats that Transformers or others save models in, to say what was found instead of safetensors.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Shards:
    """The tensors of a checkpoint by their names in its files.

    Files of a Hub checkpoint are fetched when a tensor in them is first asked for. No file stays open: the tensors are
    pages of the file, mapped by safetensors, and leave memory with the last reference to them.

    Args:
        name: A local folder, or a Hub id.
        token: The token for the Hub.

    Raises:
        LayerProbeError: No safetensors checkpoint there, or an index that cannot be read.
    """

    def __init__(self, name: str, *, token: str | bool | None = None) -> None:
        self.name = name
        self._token = token
        self._commit: str | None = None
        self._paths: dict[str, str] = {}
        self._shard_of = self._list_tensors()

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    @property
    def keys(self) -> list[str]:
        return list(self._shard_of)

    def locate(self, keys: Iterable[str]) -> None:
        """Finds (on the Hub: fetches) the files that hold these tensors.

        Raises:
            LayerProbeError: A file that the index names is not there.
        """
        for shard in dict.fromkeys(self._shard_of[key] for key in keys):
            self._path(shard)

    def files(self) -> list[Path]:
        """The files that hold tensors, in the order of their names; located (on the Hub: fetched) if they were not yet.

        Raises:
            LayerProbeError: A file that the index names is not there.
        """
        return [Path(self._path(shard)) for shard in sorted(set(self._shard_of.values()))]

    def read(self, key: str) -> torch.Tensor:
        """One tensor as it is stored.

        Raises:
            LayerProbeError: Its file is not there, is damaged or does not hold it.
        """
        path = self._path(self._shard_of[key])
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise LayerProbeError(
                f"Cannot read the tensor {key!r} from {path}: {error}. The file is damaged, or does not belong to its "
                "index; save or download the checkpoint again."
            ) from error

    def version(self) -> str:
        """The commit on the Hub, or the files with their sizes and times."""
        if self._commit is not None:
            return self._commit
        paths = [Path(self._path(shard)) for shard in sorted(set(self._shard_of.values()))]
        return "; ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)

    def _list_tensors(self) -> dict[str, str]:
        """Tensor name → file name."""
        try:
            path = self._fetch(SAFE_WEIGHTS_NAME)
        except OSError:
            return self._list_index()
        self._paths[SAFE_WEIGHTS_NAME] = path
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        except (SafetensorError, OSError) as error:
            raise LayerProbeError(
                f"Cannot read {path}: {error}. The file is damaged; save or download the checkpoint again."
            ) from error

    def _list_index(self) -> dict[str, str]:
        try:
            path = self._fetch(SAFE_WEIGHTS_INDEX_NAME)
        except OSError as error:
            raise LayerProbeError(self._why_no_safetensors(error)) from error
        try:
            shard_of = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            return {str(key): str(shard) for key, shard in shard_of.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LayerProbeError(
                f"{path} is no index of a checkpoint: expected JSON with a 'weight_map' from tensor to file names "
                f"({type(error).__name__}: {error}). Save or download it again."
            ) from error

    def _path(self, shard: str) -> str:
        if shard not in self._paths:
            try:
                self._paths[shard] = self._fetch(shard)
            except OSError as error:
                raise LayerProbeError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} of {self.name!r} names the file {shard!r}, which cannot be had: {error}"
                ) from error
        return self._paths[shard]

    def _fetch(self, file: str) -> str:
        path = cached_file(self.name, file, revision=self._commit, token=self._token)
        # The other files are taken from the commit of the first: a push in between must not mix two models.
        self._commit = extract_commit_hash(path, self._commit)
        return path

    def _why_no_safetensors(self, error: OSError) -> str:
        folder = Path(self.name)
        message = f"{self.name!r} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
        if not folder.is_dir():
            message += f" ({error})"
        elif others := sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS):
            message += f"; found {', '.join(others)}"
        return (
            f"{message}. Only safetensors are read tensor by tensor; pickled checkpoints (.bin) are not read at all, "
            "because opening one can run code. Load the model and save it with `save_pretrained`."
        )

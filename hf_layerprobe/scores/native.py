"""The search for partners in C (`partners.c`), for Linux on processors with AMX, compiled when it is first needed.

Where it cannot be had, `kernel()` is None and torch does the work: no AMX, no C compiler, no place for the library, a
library that does not load or does not find what torch finds, or `HF_LAYERPROBE_NATIVE=0` in the environment.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from transformers.utils import logging

from ..errors import LayerProbeError
from ..files import write_atomically

logger = logging.get_logger(__name__)
SOURCES = [
    Path(__file__).with_name(name) for name in ("partners_check.c", "partners.c")
]  # the first includes the second
COMPILERS = ("cc", "gcc", "clang")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "f16c", "fma", "amx_tile", "amx_bf16")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread")
FLAGS += tuple("-m" + {"avx512_bf16": "avx512bf16"}.get(name, name).replace("_", "-") for name in NEEDED)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THREADS = 256


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("step", "stride", "dtype", "vectors", "length")),
        ("scale", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
    ]


class _Pair(ctypes.Structure):
    _fields_ = [
        ("y", ctypes.POINTER(_Matrix)),
        *((name, ctypes.c_void_p) for name in ("best_x", "best_y", "value_x", "value_y", "place_x", "place_y")),
    ]


class Packed:
    """Vectors as the kernel takes them: beside their own values, unit vectors in bfloat16, in its order.

    Args:
        rows: `[m, n]` on the CPU, of a dtype in `DTYPES`, with one of the two strides 1; kept, not copied.
        scale: `[m]` float32, one over the norm of each row.
    """

    def __init__(self, rows: torch.Tensor, scale: torch.Tensor):
        size = _padded(len(rows)) * _padded(rows.shape[1])
        self.rows, self.scale, self.packed = rows, scale, torch.empty(size, dtype=torch.bfloat16)
        pointers = self.scale.data_ptr(), self.packed.data_ptr()
        self.matrix = _Matrix(rows.data_ptr(), *rows.stride(), DTYPES[rows.dtype], *rows.shape, *pointers)
        kernel().hf_layerprobe_pack(ctypes.byref(self.matrix), ctypes.c_int64(torch.get_num_threads()))

    def __len__(self) -> int:
        return len(self.rows)


def takes(rows: torch.Tensor) -> bool:
    """Whether the kernel reads this matrix `[m, n]`, and is there."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in DTYPES
        and (rows.stride(1) == 1 or rows.stride(0) == 1)
        and rows.numel() < 2**31  # places are 32-bit integers
        and kernel() is not None
    )


def matches(X: Packed, Ys: Sequence[Packed]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `matching.best_matches`: float32 cosines with partners that are searched in bfloat16."""
    library, threads = kernel(), min(torch.get_num_threads(), THREADS)
    chunks = library.hf_layerprobe_chunks(ctypes.c_int64(len(X)))
    left = torch.empty_like(X.packed)
    scratch = torch.empty(threads, library.hf_layerprobe_scratch())
    # One tensor of each sort for all pairs, and addresses in it: many small ones would take longer than small products.
    count, m, sizes = len(Ys), len(X), [len(Y) for Y in Ys]
    ends = list(accumulate(sizes, initial=0))
    padded_ends = list(accumulate((chunks * _padded(size) for size in sizes), initial=0))
    best_x, best_y = torch.empty(count, m), torch.empty(ends[-1])
    kept_x = torch.empty(2, count * m, dtype=torch.int32)  # values and places
    kept_y = torch.empty(2, padded_ends[-1], dtype=torch.int32)
    pairs = (_Pair * count)()
    for i, Y in enumerate(Ys):
        pairs[i] = _Pair(
            ctypes.pointer(Y.matrix),
            _address(best_x, i * m),
            _address(best_y, ends[i]),
            _address(kept_x[0], i * m),
            _address(kept_y[0], padded_ends[i]),
            _address(kept_x[1], i * m),
            _address(kept_y[1], padded_ends[i]),
        )
    library.hf_layerprobe_match(
        ctypes.byref(X.matrix),
        pairs,
        ctypes.c_int64(count),
        ctypes.c_void_p(left.data_ptr()),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int64(threads),
    )
    return list(zip(best_x.unbind(), best_y.split(sizes), strict=True))


def _address(numbers: torch.Tensor, index: int) -> int:
    return numbers.data_ptr() + 4 * index


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled search, loaded and checked; None where it cannot be had."""
    try:
        library = _loaded()
    except (LayerProbeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info(f"DOCS searches partners with torch: {error}")
        return None
    return library


def _loaded() -> ctypes.CDLL:
    if os.environ.get("HF_LAYERPROBE_NATIVE", "1") == "0":
        raise LayerProbeError("HF_LAYERPROBE_NATIVE is 0.")
    missing = [name for name in NEEDED if name not in _processor()]
    if missing:
        raise LayerProbeError(f"this is no Linux on a processor with {', '.join(missing)}.")
    library = ctypes.CDLL(str(_library()))
    library.hf_layerprobe_chunks.restype = library.hf_layerprobe_scratch.restype = ctypes.c_int64
    if library.hf_layerprobe_start():
        raise LayerProbeError("the system does not grant the use of AMX.")
    return library


def _processor() -> set[str]:
    """The features of the processor that Linux lets programs use; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def _library() -> Path:
    """The compiled library, made now if it is not there whole.

    Its last 32 bytes are the SHA-256 of the others, since loading a damaged library can end the process.
    """
    compiler = next((path for name in (os.environ.get("CC", ""), *COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        raise LayerProbeError(f"there is no C compiler ({', '.join(COMPILERS)}).")
    stat = Path(compiler).stat()
    key = f"{compiler} {stat.st_size} {stat.st_mtime_ns} {FLAGS}".encode()
    key += b"".join(source.read_bytes() for source in SOURCES)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_layerprobe"
    path = folder / f"partners-{hashlib.sha256(key).hexdigest()[:16]}.so"
    content = path.read_bytes() if path.exists() else b""
    if len(content) < 32 or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        content = _compiled(compiler)
        write_atomically(path, content + hashlib.sha256(content).digest())
    return path


def _compiled(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "partners.so"
        command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        if done.returncode:
            raise LayerProbeError(f"{compiler} does not compile {SOURCES[0].name}: {done.stderr.strip()[-500:]}")
        # In a process of its own: what a compiler got wrong may end it.
        check = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(output)!r}).hf_layerprobe_check())"
        done = subprocess.run(
            [str(sys.executable), "-c", check], capture_output=True, text=True, errors="replace", timeout=120
        )
        if done.returncode:
            raise LayerProbeError(f"what {compiler} makes of {SOURCES[0].name} does not work ({done.returncode}).")
        return output.read_bytes()


def _padded(number: int) -> int:
    return (number + 31) // 32 * 32

"""Arrays from files: IDX (gzipped or not), `.npy`, `.npz`, or a folder of them. What is not compressed is mapped.

A page of a mapped file counts as this process's memory from when it is read until it is given back, which costs nothing
but another look into the page cache.
"""

from __future__ import annotations

import gzip
import math
import mmap
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvae.errors import FastvaeError, one_line

__all__ = ["Source", "advise", "mapped_file", "read_file", "read_folder"]


@dataclass(frozen=True)
class Source:
    """An array as it was found, and where, for messages."""

    where: str
    array: NDArray[Any]


def mapped_file(array: NDArray[Any]) -> mmap.mmap | None:
    """The map that `array` is a view of, if it is one of a file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def advise(file: mmap.mmap | None, advice: str, start: int = 0, length: int | None = None) -> None:
    """`madvise` where there is it (not on Windows): "MADV_DONTNEED" gives the pages of a mapped file back."""
    if file is not None and hasattr(mmap, advice):
        file.madvise(getattr(mmap, advice), start, len(file) - start if length is None else length)


def read_folder(folder: Path) -> dict[str, Source]:
    """The array of the one train file of a folder as "train", and of its test file, if it has one, as "test".

    Those are the IDX files (`train-images-idx3-ubyte` or `train-images.idx3-ubyte`, gzipped or not) and `.npy` files
    without `label` in the name; those with `t10k` or `test` in the name are test, the rest train.

    Raises: FastvaeError as `read_file`, and if there is no train file or more than one file for either.
    """
    files: dict[str, dict[str, Path]] = {"train": {}, "test": {}}
    # in reverse order, so that of X and X.gz it is X, which can be mapped, that stays
    for path in sorted(folder.iterdir(), reverse=True):
        name = path.name.lower().removesuffix(".gz").replace(".idx", "-idx")
        if path.is_file() and "label" not in name and ("-idx" in name or name.endswith(".npy")):
            files["test" if "t10k" in name or "test" in name else "train"][name] = path
    for split, found in files.items():
        if len(found) > 1 or (split == "train" and not found):
            names = ", ".join(sorted(path.name for path in found.values())) or "none"
            raise FastvaeError(
                f"{folder} has {len(found)} {split} files ({names}): expected one, IDX or .npy, such as "
                "train-images-idx3-ubyte.gz"
            )
    return {split: read_file(path)["train"] for split, found in files.items() for path in found.values()}


def read_file(path: Path) -> dict[str, Source]:
    """The one array of an IDX, `.npy` or `.npz` file as "train", or the two of an `.npz` file as "train" and "test".

    Raises: FastvaeError if the file is cut short, damaged, of another kind, or holds pickled objects.
    """
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        # mapped copy-on-write, because torch warns of memory that cannot be written to
        array = np.lib.format.open_memmap(path, mode="c") if path.suffix == ".npy" else _read_idx(path)
        return {"train": Source(str(path), array)}
    except FastvaeError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        kind = f"{path.suffix} file without pickled objects" if path.suffix in (".npy", ".npz") else "IDX file"
        raise FastvaeError(f"{path} cannot be read ({one_line(error)}): expected a whole {kind}") from error


def _read_npz(path: Path) -> dict[str, Source]:
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as loaded:
        keys = loaded.files
        if len(keys) == 1:
            names = {"train": keys[0]}
        elif {"train", "test"} <= set(keys):
            names = {"train": "train", "test": "test"}
        elif {"x_train", "x_test"} <= set(keys):
            names = {"train": "x_train", "test": "x_test"}
        else:
            found = ", ".join(keys) or "none"
            raise FastvaeError(
                f"{path} has the arrays {found}: expected train and test, x_train and x_test, or only one"
            )
        return {split: Source(f"{path}[{name}]", loaded[name]) for split, name in names.items()}


_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> NDArray[Any]:
    """IDX: 00 00, the type, the number of dimensions, each dimension as a big-endian 32-bit integer, the values.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    raw = _read_bytes(path)
    magic = raw[:4].tobytes()
    start = 4 + 4 * magic[3] if len(magic) == 4 else 4
    if len(raw) < start or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES:
        found = magic.hex(" ") or "nothing"
        raise FastvaeError(f"{path} begins with {found}: expected the header of an IDX file, such as 00 00 08 03")
    shape = tuple(raw[4:start].view(">u4").tolist())
    dtype = np.dtype(_IDX_DTYPES[magic[2]])
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) - start != expected:
        raise FastvaeError(
            f"{path} has {len(raw) - start:,} bytes of values: expected {expected:,} for its header's shape {shape}"
        )
    return raw[start:].view(dtype).reshape(shape)


def _read_bytes(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, unpacked if they are gzip's, whatever the name says: downloads come either way."""
    with path.open("rb") as file:
        begin = file.read(2)
    if begin == b"\x1f\x8b":
        with gzip.open(path) as unzipped:
            # a bytearray, because torch warns of memory that cannot be written to
            return np.frombuffer(bytearray(unzipped.read()), np.uint8)
    # an empty file cannot be mapped
    return np.memmap(path, np.uint8, mode="c") if begin else np.empty(0, np.uint8)

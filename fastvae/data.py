"""Data sets: examples in [0, 1], `[N, D]` on the CPU, from a name, a folder or a file.

- `digits`: the 1,797 scans of 8 x 8 pixels that come with scikit-learn, values 0..16 spread over 0..255; every sixth is
  test (300), the others are train (1,497).
- `mnist`, `fashion-mnist`, `kmnist`: downloaded once, checked, into the platform's cache for `fastvae` (on Linux
  `$XDG_CACHE_HOME/fastvae`, by default `~/.cache/fastvae`), or read from a folder that has them.
- a folder of IDX files, gzipped or not, or of `.npy` files: `t10k` or `test` in the name is test, `label` is skipped.
- a file: IDX, `.npy`, or `.npz` with `train` and `test`, or `x_train` and `x_test`, or one array.

uint8 means x / 255, bool becomes uint8, floating point becomes float32 and must lie in [0, 1]. Where there is no test
set, the last tenth of the examples is held out, in the order of the file: shuffle a sorted file first. Files that are
not compressed are mapped, not read, and remain so unless their type has to change: data may be larger than memory.
"""

from __future__ import annotations

import difflib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.array_files import Source, advise, mapped_file, read_file, read_folder
from fastvae.downloads import DOWNLOADS, download
from fastvae.errors import FastvaeError

__all__ = ["Dataset", "load_dataset"]

PIECE_BYTES = 16 * 2**20
"""How much of a file is looked through at a time."""


@dataclass(frozen=True)
class Dataset:
    """Examples of one shape. The tensors are read-only by agreement: they may be views of a file."""

    name: str
    train: Tensor  # [N, D], uint8 (x / 255) or float32 in [0, 1], contiguous, on the CPU
    test: Tensor  # [M, D], of the same dtype
    shape: tuple[int, ...]  # of one example, D = prod(shape), channels first: (28, 28) or (3, 32, 32)
    train_file: mmap.mmap | None = None  # the mapped file that `train` is a view of, if it is one
    test_file: mmap.mmap | None = None

    @property
    def num_bytes(self) -> int:
        return self.train.nbytes + self.test.nbytes


def load_dataset(name_or_path: str, *, data_dir: Path | None = None) -> Dataset:
    """The data set of that name, or in that folder or file: see the module's text for what there is.

    With `data_dir` nothing is downloaded: a name is looked up in `data_dir/NAME`, else in `data_dir`, where any whole
    files will do; a path is relative to `data_dir`.

    Raises: FastvaeError for an unknown name, a failed download, a file that is missing, cut short or of another kind,
    another dtype, values outside [0, 1], no examples, or a test set of another shape or dtype.
    """
    if name_or_path == "digits":
        return _dataset("digits", _digits())
    if name_or_path in DOWNLOADS and data_dir is None:
        return _dataset(name_or_path, read_folder(download(name_or_path)))
    folder = (data_dir or Path()).expanduser()
    path = folder / Path(name_or_path).expanduser()
    if name_or_path in DOWNLOADS and not path.is_dir():
        path = folder
    if path.is_dir():
        return _dataset(name_or_path, read_folder(path))
    if path.is_file():
        return _dataset(name_or_path, read_file(path))
    if name_or_path in DOWNLOADS:
        files = " and ".join(DOWNLOADS[name_or_path].sha256)
        raise FastvaeError(f"there is no folder {path}: expected one with {files}")
    known = ["digits", *DOWNLOADS]
    near = difflib.get_close_matches(name_or_path.lower().replace("_", "-"), known, n=1)
    raise FastvaeError(
        f"unknown data set {name_or_path!r}: expected one of {', '.join(known)}, or a file or folder ({path} is none)"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _digits() -> dict[str, Source]:
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    is_test = np.arange(len(images)) % 6 == 0
    return {"train": Source("digits", images[~is_test]), "test": Source("digits", images[is_test])}


def _dataset(name: str, sources: dict[str, Source]) -> Dataset:
    train = _examples(sources["train"])
    if "test" in sources:
        test = _examples(sources["test"])
    elif len(train) > 1:
        # the tail, because it is a view, as a random or a regular choice would not be
        held_out = max(1, len(train) // 10)
        train, test = train[:-held_out], train[-held_out:]
    else:
        raise FastvaeError(f"{sources['train'].where} has 1 example: expected 2 or more, the last tenth to hold out")
    if (train.shape[1:], train.dtype) != (test.shape[1:], test.dtype):
        raise FastvaeError(
            f"{sources['test'].where} has examples of shape {test.shape[1:]}, {test.dtype}: expected "
            f"{train.shape[1:]}, {train.dtype}, as in {sources['train'].where}"
        )
    rows = [np.ascontiguousarray(x).reshape(len(x), -1) for x in (train, test)]
    tensors, files = [torch.from_numpy(x) for x in rows], [mapped_file(x) for x in rows]
    return Dataset(name, tensors[0], tensors[1], train.shape[1:], files[0], files[1])


def _examples(source: Source) -> NDArray[Any]:
    """The array as uint8 or float32, `[N, ...]`: itself, not a copy, if it is that already."""
    where, x = source.where, source.array
    if x.ndim < 2 or x.size == 0:
        raise FastvaeError(f"{where} has shape {x.shape}: expected [N, ...], N >= 1 examples of at least one value")
    if x.ndim == 4 and x.shape[3] in (3, 4) and x.shape[1] not in (1, 3, 4):
        raise FastvaeError(
            f"{where} has examples of shape {x.shape[1:]}: expected channels first (np.moveaxis(x, 3, 1))"
        )
    if x.dtype == np.bool_:
        x = np.where(x, np.uint8(255), np.uint8(0))
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise FastvaeError(f"{where} has type {x.dtype}: expected uint8, bool, or floating point in [0, 1]")
    bounds = np.array([(piece.min(), piece.max()) for piece in _pieces(x)])
    low, high = bounds[:, 0].min(), bounds[:, 1].max()
    if np.isnan(low):
        count = sum(int(np.isnan(piece).sum()) for piece in _pieces(x))
        raise FastvaeError(f"{where} has NaN at {count:,} of {x.size:,} places: expected values in [0, 1]")
    if low < 0 or high > 1:
        raise FastvaeError(f"{where} has values from {low:g} to {high:g}: expected [0, 1], or uint8 from 0 to 255")
    return x.astype(np.float32, copy=False)


def _pieces(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All of `x`, some rows at a time: a mapped file is never in memory as a whole."""
    rows, file = max(1, PIECE_BYTES * len(x) // x.nbytes), mapped_file(x)
    for start in range(0, len(x), rows):
        yield x[start : start + rows]
        advise(file, "MADV_DONTNEED")

"""One safetensors file per checkpoint, whole or not there: written beside its place, flushed, then renamed.

A checkpoint holds named tensors and, as one JSON object in the safetensors header, metadata: the caller's own keys and

    fastvae_checkpoint   version of this format, an integer
    fastvae_version, torch_version
    crc32                of the metadata and of every tensor's name, dtype, shape and bytes

No pickle. The file's bytes depend on the content alone. safetensors orders tensors itself, but keeps its header's own
string pairs in a random order: hence one pair, whose value is the JSON object.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvae import __version__
from fastvae.errors import FastvaeError, one_line

__all__ = ["load_checkpoint", "save_checkpoint", "write_atomic"]

FORMAT_VERSION = 1
_KEY = "fastvae_checkpoint"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` (any device, dtype, strides; shared memory is written twice) and `metadata` (JSON) to `path`.

    Whatever happens, `path` is afterwards the old file, whole, or the new one, whole and on the disk. One process at a
    time may write a path, and the tensors must not change meanwhile. The reserved metadata keys are overwritten.

    Raises: FastvaeError if the file cannot be written; TypeError if the metadata is not JSON.
    """
    owned = _own(tensors)
    header = {
        **metadata,
        _KEY: FORMAT_VERSION,
        "fastvae_version": __version__,
        "torch_version": str(torch.__version__),
    }
    header["crc32"] = _checksum(header, owned)
    with _replacing(path) as temporary:
        # what processes killed in the middle of a save have left
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        save_file(owned, temporary, metadata={_KEY: _canonical(header)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, in memory of their own) and the metadata that `save_checkpoint` was given.

    JSON makes lists of tuples and strings of integer keys; the metadata comes with the reserved keys but for `crc32`.

    Raises: FastvaeError if the file is missing, cut short, damaged, not a fastvae checkpoint, or of a newer format.
    """
    if not path.is_file():
        raise FastvaeError(f"no checkpoint at {path}: expected a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = _parse_header(path, file.metadata())
            # the tensors of an open file are views of it; a copy outlives its replacement
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise FastvaeError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short, damaged, or no checkpoint at all: "
            f"expected a whole safetensors file ({one_line(error)})"
        ) from error
    if header.pop("crc32", None) != _checksum(header, tensors):
        raise FastvaeError(f"{path} is damaged: its content does not match the checksum that it carries")
    return tensors, header


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file (text as UTF-8) so that readers, and a crash at any moment, see the old one or the new one.

    Raises: FastvaeError if it cannot be written.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`: its file takes the place of `path` if the block ends well, and is removed if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise FastvaeError(f"cannot write {path}: {one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    # the rename itself survives a power cut only once the directory is on the disk; Windows cannot open one
    if os.name != "nt":
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, row-major, no two in one storage: safetensors refuses the rest."""
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned


def _parse_header(path: Path, pairs: dict[str, str] | None) -> dict[str, Any]:
    """The metadata, if this is a fastvae checkpoint of a version that this program reads."""
    try:
        header = json.loads((pairs or {})[_KEY])
        version = header[_KEY]
    except (KeyError, TypeError, ValueError) as error:
        raise FastvaeError(
            f"{path} is a safetensors file, but not a fastvae checkpoint: expected metadata under {_KEY!r}"
        ) from error
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise FastvaeError(
            f"{path} has checkpoint format {version!r}, written by fastvae {header.get('fastvae_version')}; "
            f"fastvae {__version__} reads formats 1 to {FORMAT_VERSION}"
        )
    return dict(header)


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(_canonical(header).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _canonical(header: Mapping[str, Any]) -> str:
    # a round trip first: sorting needs the keys as the strings that JSON makes of them
    return json.dumps(json.loads(json.dumps(header)), sort_keys=True, separators=(",", ":"))

"""A kernel in good order and the same with planted faults, for the gate of bench.static; run by test_static.py.

`python static_plants.py FOLDER` makes a baseline of the good one in FOLDER and prints, as JSON, what the gate says of
each: {"good": null, "spill": "...", ...}, null for no complaint.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import fastvae_kernels
import torch
import triton
import triton.language as tl

from bench.static import baseline
from bench.static.__main__ import Arguments, run

CASE = "kl_standard_normal fwd fp32 4096x64"


@triton.jit
def _row_sums_kernel(
    mu_ptr,
    logvar_ptr,
    kl_ptr,
    stride,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TWICE: tl.constexpr,
    AGAIN: tl.constexpr,
    LATER: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * stride + tl.arange(0, L)[None, :]
    total = tl.zeros((ROWS, L), tl.float32)
    for _ in range(TWICE):
        total += tl.load(mu_ptr + offset) * tl.load(logvar_ptr + offset)
    if LATER:
        # every element of the tile stays in a register until all of them have been summed
        total *= tl.sum(tl.sum(total, axis=1), axis=0)
    kl = tl.sum(total, axis=1)
    tl.store(kl_ptr + row, kl)
    if AGAIN:
        tl.store(kl_ptr + row, kl + tl.sum(tl.load(mu_ptr + offset), axis=1))


@triton.jit(do_not_specialize=["stride"])
def _narrow_kernel(mu_ptr, logvar_ptr, kl_ptr, stride, L: tl.constexpr, ROWS: tl.constexpr):
    # an alignment that the compiler does not know
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * stride + tl.arange(0, L)[None, :]
    tl.store(kl_ptr + row, tl.sum(tl.load(mu_ptr + offset) * tl.load(logvar_ptr + offset), axis=1))


def launcher(*, rows=16, twice=1, again=False, later=False, num_warps=4, copy=False):
    def kl_standard_normal_fwd(mu, logvar):
        B, L = mu.shape
        kl = torch.empty(B)
        _row_sums_kernel[(B // rows,)](
            mu, logvar, kl, L, L=L, ROWS=rows, TWICE=twice, AGAIN=again, LATER=later, num_warps=num_warps
        )
        return kl.clone() if copy else kl

    return kl_standard_normal_fwd


def narrow(mu, logvar):
    kl = torch.empty(mu.shape[0])
    _narrow_kernel[(mu.shape[0] // 16,)](mu, logvar, kl, mu.stride(0), L=mu.shape[1], ROWS=16)
    return kl


PLANTS = {
    "good": launcher(),
    # 512 elements for each of 32 threads
    "spill": launcher(rows=256, later=True, num_warps=1),
    "second read": launcher(again=True),
    "second visit": launcher(twice=2),
    "extra launch": launcher(copy=True),
    "more work": launcher(later=True),
    "narrow": narrow,
}


def complaint(plant: str, **arguments: object) -> str | None:
    with mock.patch.object(fastvae_kernels, "kl_standard_normal_fwd", PLANTS[plant]):
        try:
            # what it says when all is well is not for our reader
            with contextlib.redirect_stdout(sys.stderr):
                run(Arguments(arch=("sm_90",), op=CASE, jobs=1, **arguments))
        except (SystemExit, ValueError) as refused:
            return str(refused)
    return None


def main(folder: Path) -> None:
    from bench.static.collect import collect

    baseline.PATH = folder / "baseline.json"
    found = {"no baseline": complaint("good", check=True)}
    with mock.patch.object(fastvae_kernels, "kl_standard_normal_fwd", PLANTS["good"]):
        baseline.write(baseline.PATH, collect(["sm_90"], CASE))
    found |= {plant: complaint(plant, check=True) for plant in PLANTS}

    # another Triton compiles other code: counts are not compared, spills and widths are
    text = baseline.PATH.read_text()
    baseline.PATH.write_text(text.replace(triton.__version__, "1.0.0"))
    found |= {f"{plant}, other triton": complaint(plant, check=True) for plant in ("spill", "second read", "narrow")}
    baseline.PATH.write_text(text.replace(CASE, f"{CASE} once"))
    found["renamed"] = complaint("good", check=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Compiles likelihood launches for a GPU that is not there, and prints what was compiled as JSON, for test_kernel_bugs.

A process of its own: where the tests run, Triton may interpret.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import fastvae_kernels as kernels
import torch

from bench.static.capture import Launch, recording

D = 784
SEED = torch.zeros(1, dtype=torch.int64)


def launches(*calls: Callable[[], object]) -> list[Launch]:
    with recording("sm_90") as record:
        for call in calls:
            call()
    return [launch for launch in record if isinstance(launch, Launch)]


def forward(rows: int, *, offset: int = 0, seed: torch.Tensor | None = None, shift: int = 0) -> Callable[[], object]:
    logits = torch.empty(rows * D + shift)[shift:].view(rows, D)
    return lambda: kernels.bernoulli_nll_fwd(logits, logits, seed, offset)


def gather(rows: int, offset: int) -> Callable[[], object]:
    data, index = torch.empty(8, D, dtype=torch.uint8), torch.empty(rows, dtype=torch.int64)
    return lambda: kernels.gather_batch(data, index, "binarize", SEED, offset, torch.float32)


mu, weight = torch.empty(4096, D), torch.empty(4096)
groups = {
    "batch sizes": launches(*(forward(rows) for rows in (4096, 4097, 5000, 8191))),
    "example offsets": launches(*(forward(4096, offset=n, seed=SEED) for n in (0, 1, 7, 2**33, 2**40))),
    "storage offsets": launches(*(forward(4096, shift=n) for n in (1, 2, 3, 5))),
    "gathered batches": launches(*(gather(rows, n) for rows, n in ((4096, 0), (4097, 2**40)))),
    "one pass": launches(
        lambda: kernels.bernoulli_nll_with_grad(mu, mu, weight, None, 0, True),
        lambda: kernels.gaussian_nll_with_grad(mu, mu, mu, weight, True),
        lambda: kernels.gaussian_nll_with_grad(mu, mu[0, 0], mu, weight, False),
    ),
}
print(
    json.dumps(
        {
            name: {"compiled": len({x.compiled.hash for x in found}), "ptx": [x.compiled.asm["ptx"] for x in found]}
            for name, found in groups.items()
        }
    )
)

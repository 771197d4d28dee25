"""Every operation of the Numba kernels on random tensors, for tests of what they have in common."""

from __future__ import annotations

from collections.abc import Callable

import fastvae_cpu_kernels as kernels
import torch
from torch import Tensor

SEED = torch.tensor([-(2**62) + 12345])


def every_op(*leading: int, D: int, samples: int = 3) -> dict[str, Callable[[], object]]:
    """Every entry point of the package on random tensors `[*leading, D]`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a, b, c, d, e = (normal(*leading, D) for _ in range(5))
    row, weight = normal(*leading), normal(*leading)
    x = torch.randint(0, 256, (*leading, D), dtype=torch.uint8, generator=generator)
    dz, dr = normal(samples, *leading, D), normal(samples, *leading)
    shared = normal(D)
    data = torch.randint(0, 256, (64, D), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, 64, (leading[-1],), generator=generator)

    def adam() -> tuple[Tensor, ...]:
        p, m, v = a.clone(), b.clone(), c.abs()
        for weight_decay in (0, 0.01):  # an integer is compiled for no differently
            kernels.adam_([p], [d], [m], [v], [torch.tensor(3.0)], torch.tensor(0.1), (0.9, 0.99), 1e-8, weight_decay)
        return p, m, v

    def scaled() -> Tensor:
        kernels.scale_(out := a.clone(), torch.tensor(0.7))
        return out

    return {
        "adam_": adam,
        "scale_": scaled,
        "activation_bwd_": lambda: kernels.activation_bwd_(a.flatten(0, -2).clone(), b.flatten(0, -2), "tanh"),
        "reparameterize_fwd": lambda: kernels.reparameterize_fwd(a, b, SEED, samples, 5, 2, 0),
        "reparameterize_bwd": lambda: kernels.reparameterize_bwd(dz, b, SEED, samples, 5, 2, 0),
        "kl_standard_normal_fwd": lambda: kernels.kl_standard_normal_fwd(a, b),
        "kl_standard_normal_bwd": lambda: kernels.kl_standard_normal_bwd(row, a, b),
        "kl_normal_fwd": lambda: kernels.kl_normal_fwd(a, b, c, d),
        "kl_normal_bwd": lambda: kernels.kl_normal_bwd(row, a, b, c, d),
        "reparameterize_kl_fwd": lambda: kernels.reparameterize_kl_fwd(a, b, SEED, 5, 0, True),
        "reparameterize_kl_bwd": lambda: kernels.reparameterize_kl_bwd(e, row, a, b, SEED, 5, 0),
        "log_ratio_fwd": lambda: kernels.reparameterize_log_ratio_fwd(a, b, SEED, samples, 5, 2),
        "log_ratio_bwd": lambda: kernels.reparameterize_log_ratio_bwd(dz, dr, a, b, SEED, samples, False, 5, 2),
        "log_ratio_landing": lambda: kernels.reparameterize_log_ratio_bwd(dz, dr, a, b, SEED, samples, True, 5, 2),
        "bernoulli_nll_fwd": lambda: kernels.bernoulli_nll_fwd(a, x, None, 0),
        "bernoulli_nll_bwd": lambda: kernels.bernoulli_nll_bwd(row, a, x, None, 0),
        "bernoulli_with_grad": lambda: kernels.bernoulli_nll_with_grad(a, x, weight, SEED, 5, True),
        "gaussian_nll_fwd": lambda: kernels.gaussian_nll_fwd(a, b, x),
        "gaussian_nll_bwd": lambda: kernels.gaussian_nll_bwd(row, a, b, x),
        "gaussian_with_grad": lambda: kernels.gaussian_nll_with_grad(a, b, x, weight, True),
        "gaussian_per_feature": lambda: kernels.gaussian_nll_bwd(row, a, shared, x),
        "gaussian_scalar": lambda: kernels.gaussian_nll_bwd(row, a, torch.tensor(0.3), x),
        "gather_batch": lambda: kernels.gather_batch(data, index, "binarize", SEED, 5, torch.float32),
    }


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else []

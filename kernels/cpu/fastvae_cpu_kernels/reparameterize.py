"""z_k = mu + exp(logvar / 2) eps_k, eps ~ N(0, I): one sample of each posterior, or K.

Source: Kingma & Welling 2013, Section 2.4. The kernels are in `_samples`.
"""

from __future__ import annotations

from torch import Tensor

from ._samples import draw_samples, samples_backward

__all__ = ["reparameterize_bwd", "reparameterize_fwd"]


def reparameterize_fwd(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    example_offset: int,
    sample_offset: int,
    stream: int,
) -> Tensor:
    """z `[num_samples, ..., L]`, or `[..., L]` for None, for mu, logvar `[..., L]` float32."""
    return draw_samples(mu, logvar, seed, num_samples, example_offset, sample_offset, stream, with_ratio=False)[0]


def reparameterize_bwd(
    dz: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    example_offset: int,
    sample_offset: int,
    stream: int,
) -> tuple[Tensor | None, Tensor]:
    """(dmu, dlogvar) `[..., L]`, summed over the samples, for dz of the shape of z; dmu is None where it is dz.

    So it is for `num_samples` None, of which nothing is summed.
    """
    return samples_backward(
        dz,
        None,
        None,
        logvar,
        seed,
        num_samples,
        False,
        example_offset,
        sample_offset,
        stream,
        with_dmu=num_samples is not None,
    )

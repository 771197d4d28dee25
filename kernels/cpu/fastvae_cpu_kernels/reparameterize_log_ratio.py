"""K samples of each posterior and log p(z) - log q(z|x) of each = 1/2 sum_l [eps_l^2 + logvar_l - z_l^2], in nats.

SGVB estimator A and the weights of IWAE. Source: Kingma & Welling 2013, equation 6; Burda et al. 2015, equation 8;
sticking the landing: Roeder et al. 2017. The kernels are in `_samples`.
"""

from __future__ import annotations

from torch import Tensor

from ._samples import draw_samples, samples_backward

__all__ = ["reparameterize_log_ratio_bwd", "reparameterize_log_ratio_fwd"]

# the stream of `fastvae.reference.STREAM_NOISE`
STREAM_NOISE = 0


def reparameterize_log_ratio_fwd(
    mu: Tensor, logvar: Tensor, seed: Tensor, num_samples: int, example_offset: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """(z `[K, ..., L]`, log_ratio `[K, ...]`) for mu, logvar `[..., L]` float32."""
    z, ratio = draw_samples(mu, logvar, seed, num_samples, example_offset, sample_offset, STREAM_NOISE, with_ratio=True)
    assert ratio is not None
    return z, ratio


def reparameterize_log_ratio_bwd(
    dz: Tensor | None,
    dlog_ratio: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int,
    sticking_the_landing: bool,
    example_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) `[..., L]`, summed over the samples; None for an upstream gradient is zero."""
    dmu, dlogvar = samples_backward(
        dz,
        dlog_ratio,
        mu,
        logvar,
        seed,
        num_samples,
        sticking_the_landing,
        example_offset,
        sample_offset,
        STREAM_NOISE,
    )
    assert dmu is not None
    return dmu, dlogvar

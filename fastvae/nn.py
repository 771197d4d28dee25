"""Likelihoods p(x|z) as modules: how a decoder's output becomes a distribution of the data.

The paper's two (Appendix C): Bernoulli pixels, and a Gaussian with mean and variance from the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae import reference

__all__ = ["BernoulliLikelihood", "GaussianLikelihood", "Likelihood", "likelihood_from_config"]


class Likelihood(nn.Module):
    """What a likelihood answers. `params` is the decoder's output, `[..., outputs_per_element * D]`."""

    outputs_per_element: int
    """How many decoder outputs each of the D data elements takes."""

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) in nats, `[...]`, for `x` that broadcasts to `[..., D]`."""
        raise NotImplementedError

    def loss(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of weight * nll, nll), made for training: only the first is differentiable. Default: the mean."""
        raise NotImplementedError

    def linear_loss(
        self, h: Tensor, layer: nn.Linear, x: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`loss(layer(h), x, weight)`, fused with the output layer where there is a kernel for it."""
        return self.loss(F.linear(h, layer.weight, layer.bias), x, weight)

    def linear_nll(self, h: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
        """`nll(layer(h), x)`, fused with the output layer where there is a kernel for it."""
        return self.nll(F.linear(h, layer.weight, layer.bias), x)

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] in [0, 1], `[..., D]`: what is drawn as a picture."""
        raise NotImplementedError

    def sample(
        self,
        params: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: Tensor | None = None,
        example_offset: int = 0,
    ) -> Tensor:
        """A draw of p(x|z), `[..., D]`, from `generator` (default: torch's own).

        With `seed`, int64 `[1]`, the draw for `params` `[B, ...]` is a function of (seed, b + example_offset, d).
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What `likelihood_from_config` needs to make it again (weights aside), as JSON values."""
        raise NotImplementedError


class BernoulliLikelihood(Likelihood):
    """Independent Bernoulli pixels; `params` are logits `[..., D]`."""

    outputs_per_element = 1

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        return F.bernoulli_nll(params, x)

    def loss(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.bernoulli_nll_loss(params, x, weight=weight)

    def linear_loss(
        self, h: Tensor, layer: nn.Linear, x: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return F.linear_bernoulli_nll_loss(h, layer.weight, layer.bias, x, row_weight=weight)

    def linear_nll(self, h: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear_bernoulli_nll(h, layer.weight, layer.bias, x)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params.float())

    def sample(
        self,
        params: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: Tensor | None = None,
        example_offset: int = 0,
    ) -> Tensor:
        mean = self.mean(params)
        if seed is None:
            return torch.bernoulli(mean, generator=generator)
        rows = torch.arange(len(mean), device=mean.device)
        return F.gather_batch(mean, rows, transform="binarize", seed=seed, example_offset=example_offset)

    def config(self) -> dict[str, Any]:
        return {"name": "bernoulli"}


class GaussianLikelihood(Likelihood):
    """Independent Gaussian pixels: mean and log-variance from the network, or one learned log-variance for all.

    A Gaussian density is unbounded: where a pixel is constant its variance can shrink to nothing and the likelihood
    grows without end. Two things bound it. The log-variance has a smooth floor,
    `logvar = floor + softplus(raw - floor)`, whose gradient never vanishes abruptly as a clamp's would; the default of
    -7 is a standard deviation of 0.03, about 8 grey levels of 255. And 8-bit data can be dequantized uniformly
    (`--dequantize`), which makes the density a bound on the probability of the 8-bit values.

    `params` is `[..., 2 D]`, means then raw log-variances, or `[..., D]` with `shared_logvar`.
    """

    def __init__(self, *, shared_logvar: bool = False, logvar_floor: float = -7.0) -> None:
        super().__init__()
        self.logvar_floor = logvar_floor
        self.outputs_per_element = 1 if shared_logvar else 2
        self.raw_logvar = nn.Parameter(torch.zeros(())) if shared_logvar else None

    def _mean_and_raw(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., D]` means and raw log-variances (scalar when shared)."""
        if self.raw_logvar is None:
            mu, raw = params.chunk(2, dim=-1)
            return mu, raw
        return params, self.raw_logvar.to(params.dtype)

    def mean_and_logvar(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., D]` means and log-variances (scalar when shared), the floor applied."""
        mu, raw = self._mean_and_raw(params)
        return mu, reference.with_floor(raw, self.logvar_floor)

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        return F.gaussian_nll(*self._mean_and_raw(params), x, logvar_floor=self.logvar_floor)

    def loss(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.gaussian_nll_loss(*self._mean_and_raw(params), x, weight=weight, logvar_floor=self.logvar_floor)

    def linear_loss(
        self, h: Tensor, layer: nn.Linear, x: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.raw_logvar is not None:
            return super().linear_loss(h, layer, x, weight)
        return F.linear_gaussian_nll_loss(
            h, layer.weight, layer.bias, x, row_weight=weight, logvar_floor=self.logvar_floor
        )

    def linear_nll(self, h: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
        if self.raw_logvar is not None:
            return super().linear_nll(h, layer, x)
        return F.linear_gaussian_nll(h, layer.weight, layer.bias, x, logvar_floor=self.logvar_floor)

    def mean(self, params: Tensor) -> Tensor:
        return self.mean_and_logvar(params)[0].float().clamp(0.0, 1.0)

    def sample(
        self,
        params: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: Tensor | None = None,
        example_offset: int = 0,
    ) -> Tensor:
        mu, logvar = self.mean_and_logvar(params)
        if seed is None:
            seed = torch.randint(2**62, (1,), device=mu.device, generator=generator)
        mu, logvar = mu.float(), logvar.float().expand_as(mu)
        return F.reparameterize(mu, logvar, seed=seed, example_offset=example_offset, stream=reference.STREAM_DATA)

    def config(self) -> dict[str, Any]:
        return {
            "name": "gaussian",
            "shared_logvar": self.raw_logvar is not None,
            "logvar_floor": self.logvar_floor,
        }


def likelihood_from_config(config: dict[str, Any]) -> Likelihood:
    """The likelihood that `config` describes (see `Likelihood.config`)."""
    options = {key: value for key, value in config.items() if key != "name"}
    kinds: dict[str, type[Likelihood]] = {"bernoulli": BernoulliLikelihood, "gaussian": GaussianLikelihood}
    if config.get("name") not in kinds:
        raise ValueError(f"unknown likelihood {config.get('name')!r}, expected one of {', '.join(kinds)}")
    return kinds[config["name"]](**options)

"""The ops as others write them: plain formulas, `torch.distributions`, `torch.nn.functional`.

`PROVIDERS[provider][op]` takes the tensors that the op takes and returns a tuple of its differentiable results. Noise
is torch's own, from its own generator. The plain formulas are also what torch.compile is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

__all__ = ["PROVIDERS", "Function", "Results"]

Results = tuple[Tensor, ...]
Function = Callable[..., Results]

LOG_2PI = math.log(2.0 * math.pi)


def _unit(x: Tensor, like: Tensor) -> Tensor:
    """Data as floating point in [0, 1], `[..., D]` of the predictions, not copied for K samples."""
    return (x.float() / 255.0 if x.dtype == torch.uint8 else x.float()).expand_as(like)


def _mean(nll: Function) -> Function:
    return lambda *args: (nll(*args)[0].mean(),)


def _after_linear(nll: Function) -> Function:
    return lambda h, weight, bias, x: (nll(F.linear(h, weight, bias), x)[0].mean(),)


# plain formulas


def _reparameterize(mu: Tensor, logvar: Tensor) -> Results:
    return (mu + torch.exp(0.5 * logvar) * torch.randn_like(mu),)


def _kl_standard_normal(mu: Tensor, logvar: Tensor) -> Results:
    mu, logvar = mu.float(), logvar.float()
    return (0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).sum(-1),)


def _kl_normal(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Results:
    mu_q, logvar_q, mu_p, logvar_p = mu_q.float(), logvar_q.float(), mu_p.float(), logvar_p.float()
    r = logvar_q - logvar_p
    return (0.5 * ((mu_q - mu_p).square() * torch.exp(-logvar_p) + r.exp() - 1.0 - r).sum(-1),)


def _reparameterize_kl(mu: Tensor, logvar: Tensor) -> Results:
    return _reparameterize(mu, logvar) + _kl_standard_normal(mu, logvar)


def _reparameterize_log_ratio(mu: Tensor, logvar: Tensor, *, num_samples: int) -> Results:
    dtype, mu, logvar = mu.dtype, mu.float(), logvar.float()
    eps = torch.randn(num_samples, *mu.shape, device=mu.device)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z.to(dtype), 0.5 * (eps.square() + logvar - z.square()).sum(-1)


def _bernoulli_nll(logits: Tensor, x: Tensor) -> Results:
    logits = logits.float()
    return ((-F.logsigmoid(-logits) - _unit(x, logits) * logits).sum(-1),)


def _gaussian_nll(mu: Tensor, logvar: Tensor, x: Tensor) -> Results:
    mu, logvar = mu.float(), logvar.float()
    return (0.5 * (LOG_2PI + logvar + (_unit(x, mu) - mu).square() * torch.exp(-logvar)).sum(-1),)


def _relu_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return (F.linear(x, weight, bias).relu(),)


def _linear_bernoulli_nll(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Results:
    return _bernoulli_nll(F.linear(h, weight, bias), x)


def _linear_gaussian_nll(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Results:
    mu, logvar = F.linear(h, weight, bias).chunk(2, dim=-1)
    return _gaussian_nll(mu, logvar, x)


def _gather(data: Tensor, index: Tensor) -> Results:
    return (data[index].float() / 255.0,)


def _gather_binarize(data: Tensor, index: Tensor) -> Results:
    return (torch.bernoulli(*_gather(data, index)),)


EAGER: dict[str, Function] = {
    "reparameterize": _reparameterize,
    "kl_standard_normal": _kl_standard_normal,
    "kl_normal": _kl_normal,
    "reparameterize_kl": _reparameterize_kl,
    "reparameterize_log_ratio": _reparameterize_log_ratio,
    "bernoulli_nll": _bernoulli_nll,
    "bernoulli_nll_loss": _mean(_bernoulli_nll),
    "gaussian_nll": _gaussian_nll,
    "gaussian_nll_loss": _mean(_gaussian_nll),
    "linear": _relu_layer,
    "linear_bernoulli_nll": _linear_bernoulli_nll,
    "linear_gaussian_nll": _linear_gaussian_nll,
    "linear_bernoulli_nll_loss": _after_linear(_bernoulli_nll),
    "linear_gaussian_nll_loss": _mean(_linear_gaussian_nll),
    "gather_batch": _gather,
    "gather_batch_binarize": _gather_binarize,
}

# torch.distributions


def _normal(mu: Tensor, logvar: Tensor) -> D.Normal:
    return D.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)


def _prior(mu: Tensor) -> D.Normal:
    return D.Normal(mu.new_zeros(()), mu.new_ones(()), validate_args=False)


def _d_reparameterize(mu: Tensor, logvar: Tensor) -> Results:
    return (_normal(mu, logvar).rsample(),)


def _d_kl_standard_normal(mu: Tensor, logvar: Tensor) -> Results:
    mu, logvar = mu.float(), logvar.float()
    return (D.kl_divergence(_normal(mu, logvar), _prior(mu)).sum(-1),)


def _d_kl_normal(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Results:
    q, p = _normal(mu_q.float(), logvar_q.float()), _normal(mu_p.float(), logvar_p.float())
    return (D.kl_divergence(q, p).sum(-1),)


def _d_reparameterize_kl(mu: Tensor, logvar: Tensor) -> Results:
    return _d_reparameterize(mu, logvar) + _d_kl_standard_normal(mu, logvar)


def _d_reparameterize_log_ratio(mu: Tensor, logvar: Tensor, *, num_samples: int) -> Results:
    q = _normal(mu.float(), logvar.float())
    z = q.rsample((num_samples,))
    return z.to(mu.dtype), (_prior(z).log_prob(z) - q.log_prob(z)).sum(-1)


def _d_bernoulli_nll(logits: Tensor, x: Tensor) -> Results:
    likelihood = D.Bernoulli(logits=logits.float(), validate_args=False)
    return (-likelihood.log_prob(_unit(x, logits)).sum(-1),)


def _d_gaussian_nll(mu: Tensor, logvar: Tensor, x: Tensor) -> Results:
    return (-_normal(mu.float(), logvar.float()).log_prob(_unit(x, mu)).sum(-1),)


DISTRIBUTIONS: dict[str, Function] = {
    "reparameterize": _d_reparameterize,
    "kl_standard_normal": _d_kl_standard_normal,
    "kl_normal": _d_kl_normal,
    "reparameterize_kl": _d_reparameterize_kl,
    "reparameterize_log_ratio": _d_reparameterize_log_ratio,
    "bernoulli_nll": _d_bernoulli_nll,
    "bernoulli_nll_loss": _mean(_d_bernoulli_nll),
    "gaussian_nll": _d_gaussian_nll,
    "gaussian_nll_loss": _mean(_d_gaussian_nll),
}

# torch.nn.functional: the losses sum inside, which is its fastest way


def _f_bernoulli_nll(logits: Tensor, x: Tensor) -> Results:
    logits = logits.float()
    return (F.binary_cross_entropy_with_logits(logits, _unit(x, logits), reduction="none").sum(-1),)


def _f_bernoulli_nll_loss(logits: Tensor, x: Tensor) -> Results:
    logits = logits.float()
    total = F.binary_cross_entropy_with_logits(logits, _unit(x, logits), reduction="sum")
    return (total / logits.shape[:-1].numel(),)


def _f_gaussian_nll(mu: Tensor, logvar: Tensor, x: Tensor) -> Results:
    mu, var = mu.float(), torch.exp(logvar.float())
    return (F.gaussian_nll_loss(mu, _unit(x, mu), var, full=True, reduction="none").sum(-1),)


def _f_gaussian_nll_loss(mu: Tensor, logvar: Tensor, x: Tensor) -> Results:
    mu, var = mu.float(), torch.exp(logvar.float())
    total = F.gaussian_nll_loss(mu, _unit(x, mu), var, full=True, reduction="sum")
    return (total / mu.shape[:-1].numel(),)


FUNCTIONAL: dict[str, Function] = {
    "bernoulli_nll": _f_bernoulli_nll,
    "bernoulli_nll_loss": _f_bernoulli_nll_loss,
    "gaussian_nll": _f_gaussian_nll,
    "gaussian_nll_loss": _f_gaussian_nll_loss,
    "linear_bernoulli_nll_loss": _after_linear(_f_bernoulli_nll),
}

PROVIDERS = {"eager": EAGER, "distributions": DISTRIBUTIONS, "functional": FUNCTIONAL}

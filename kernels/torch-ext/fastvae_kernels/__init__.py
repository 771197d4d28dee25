"""Triton kernels of fastvae: tensors in, tensors out; no autograd, no validation, no host synchronisation."""

from ._philox import philox_words
from ._rows import ColumnSums
from ._support import supports
from .adam import adam_flat_
from .bernoulli_nll import bernoulli_nll_bwd, bernoulli_nll_fwd, bernoulli_nll_with_grad
from .gather_batch import gather_batch
from .gaussian_nll import gaussian_nll_bwd, gaussian_nll_fwd, gaussian_nll_with_grad
from .kl_normal import kl_normal_bwd, kl_normal_fwd
from .kl_standard_normal import kl_standard_normal_bwd, kl_standard_normal_fwd
from .linear import activation_bwd_, hidden_bwd, linear_bwd, linear_fwd
from .linear_bernoulli_nll import linear_bernoulli_nll_fwd
from .reparameterize import reparameterize_bwd, reparameterize_fwd
from .reparameterize_kl import reparameterize_kl_bwd, reparameterize_kl_fwd
from .reparameterize_log_ratio import reparameterize_log_ratio_bwd, reparameterize_log_ratio_fwd
from .scale import scale_
from .step import begin_step, end_step

__all__ = [
    "ColumnSums",
    "activation_bwd_",
    "adam_flat_",
    "begin_step",
    "bernoulli_nll_bwd",
    "bernoulli_nll_fwd",
    "bernoulli_nll_with_grad",
    "end_step",
    "gather_batch",
    "gaussian_nll_bwd",
    "gaussian_nll_fwd",
    "gaussian_nll_with_grad",
    "hidden_bwd",
    "kl_normal_bwd",
    "kl_normal_fwd",
    "kl_standard_normal_bwd",
    "kl_standard_normal_fwd",
    "linear_bernoulli_nll_fwd",
    "linear_bwd",
    "linear_fwd",
    "philox_words",
    "reparameterize_bwd",
    "reparameterize_fwd",
    "reparameterize_kl_bwd",
    "reparameterize_kl_fwd",
    "reparameterize_log_ratio_bwd",
    "reparameterize_log_ratio_fwd",
    "scale_",
    "supports",
]

"""Triton kernels of fastvae: tensors in, tensors out; no autograd, no validation, no host synchronisation."""

from ._philox import philox_words

__all__ = ["philox_words"]

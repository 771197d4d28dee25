"""Linear layers by our own products, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import fastvae_cpu_kernels as kernels
import pytest
import torch
from torch import Tensor, nn

from fastvae import VAE
from fastvae import functional as F
from fastvae.hmc import Posterior
from fastvae.networks import MLPDecoder
from tests.op_checks import assert_accurate

ours = pytest.mark.skipif(
    kernels.supports("linear", torch.zeros(64, 256), torch.zeros(256, 256)) is not None, reason="written for AVX-512"
)


def layer(*leading: int, inputs: int = 300, outputs: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (*leading, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return x, weight, bias


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return getattr(torch, activation, lambda y: y)(nn.functional.linear(x, weight, bias))


def launches(call: Callable[[], Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """The products of ours that a call makes, with their arguments."""
    made: list[tuple[str, tuple[Any, ...]]] = []

    def noting(name: str) -> Any:
        function = getattr(kernels, name)
        return lambda *args: made.append((name, args)) or function(*args)

    with mock.patch.multiple(kernels, create=True, **{name: noting(name) for name in ("linear_fwd", "linear_bwd")}):
        call()
    return made


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("leading", [(100,), (7, 50), (900,)], ids=str)
def test_values_and_gradients(leading: tuple[int, ...], activation: str) -> None:
    inputs = layer(*leading)
    y = F.linear(*inputs, activation)
    eager, exact = by_torch(*inputs, activation), by_torch(*(t.double() for t in inputs), activation)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert_accurate(y, exact, eager, factor=4.0)
    found = torch.autograd.grad(y, inputs, upstream)
    exact_grads = torch.autograd.grad(exact, inputs, upstream.double())
    for grad, of_exact, of_eager in zip(found, exact_grads, torch.autograd.grad(eager, inputs, upstream)):
        # float64's gradients come back as float32
        assert_accurate(grad, of_exact.double(), of_eager, factor=4.0)
    with torch.no_grad():
        assert torch.equal(F.linear(*inputs, activation), y)


@ours
def test_it_is_ours_that_run() -> None:
    x, weight, bias = layer(7, 50)
    assert [name for name, _ in launches(lambda: F.linear(x, weight, bias).sum().backward())] == [
        "linear_fwd",
        "linear_bwd",
    ]
    with torch.no_grad():
        assert [name for name, _ in launches(lambda: F.linear(x, weight, bias, "tanh"))] == ["linear_fwd"]


@ours
def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight, bias = layer(100)
    found = []
    for given in ((x, weight.detach(), bias.detach()), (x.detach(), weight, bias), (x.detach(), weight.detach(), bias)):
        loss = F.linear(*given, "relu").sum()
        found += [(needs_dx, dweight is not None) for _, (*_, needs_dx, dweight) in launches(loss.backward)]
    assert found == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, weight, bias: F.linear(x[:5], weight, bias),
        lambda x, weight, bias: F.linear(x[:10, :20], weight[:20, :20], bias[:20]),
        lambda x, weight, bias: F.linear(x.double(), weight.double(), bias.double()),
        lambda x, weight, bias: F.linear(x, weight, None),
        lambda x, weight, bias: F.linear(x[0], weight, bias),
        lambda x, weight, bias: torch.func.vmap(lambda row: F.linear(row, weight, bias))(x),
        lambda x, weight, bias: torch.compile(F.linear, backend="eager")(x, weight, bias),
    ],
    ids=["few rows", "little work", "float64", "no bias", "one row", "vmap", "compile"],
)
def test_what_is_left_to_pytorch(call: Callable[..., Tensor]) -> None:
    x, weight, bias = layer(100)
    made = []
    assert launches(lambda: made.append(call(x, weight, bias))) == []
    assert made[0].isfinite().all()


def test_autocast_and_lower_precision_are_left_to_pytorch() -> None:
    x, weight, bias = layer(100)
    with torch.autocast("cpu", torch.bfloat16):
        made = []
        assert launches(lambda: made.append(F.linear(x, weight, bias))) == []
        assert made[0].dtype == torch.bfloat16
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert launches(lambda: F.linear(x, weight, bias)) == []
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = layer(100)
    for given in ((x, weight, bias[:-1]), (x[:, :-1], weight, bias), (x, weight[:-1], bias)):
        with pytest.raises(RuntimeError, match=r"size|shape"):
            F.linear(*given)
    with pytest.raises(ValueError, match="activation is 'gelu', expected none, relu or tanh"):
        F.linear(x, weight, bias, "gelu")


def test_twice_differentiable() -> None:
    x, weight, bias = layer(100)

    def penalty(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(function(x, weight, bias, "tanh").square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    for found, expected in zip(penalty(F.linear), penalty(by_torch)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@ours
def test_hidden_layers_of_a_decoder_and_their_hooks() -> None:
    torch.manual_seed(0)
    decoder, z = MLPDecoder(50, (200, 200), 784, "tanh"), torch.randn(300, 50)
    with torch.no_grad():
        expected = decoder.body(z)
        found: list[Tensor] = []
        # the first layer, of 50 latents, is little work
        assert [args[-1] for _, args in launches(lambda: found.append(decoder.hidden(z)))] == ["tanh"]
        torch.testing.assert_close(found[0], expected)
        seen: list[Tensor] = []
        decoder.body[1].register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(decoder.hidden(z), expected)
        assert len(seen) == 1


@ours
def test_hamiltonian_monte_carlo_makes_no_gradient_of_the_weights() -> None:
    torch.manual_seed(0)
    vae, x = VAE.mlp(data_shape=(784,), latent_dim=5, hidden=(200,)), torch.rand(20, 784)
    z = torch.randn(4, 20, 5)
    found: list[tuple[Tensor, Tensor]] = []
    backward = [args for name, args in launches(lambda: found.append(Posterior(vae, x)(z))) if name == "linear_bwd"]
    assert backward
    assert all(dweight is None for *_, dweight in backward)
    # the model is as it was
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    at = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad((vae.nll(at, x) + Posterior.prior(at)).sum(), at)
    torch.testing.assert_close(found[0][1], expected, rtol=1e-4, atol=1e-4)

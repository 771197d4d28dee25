"""The loss of a whole MLP autoencoder in one Function: it is that of the plain layers, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from fastvae import _mlp_loss
from fastvae.models import VAE, Loss, MLPDecoder
from tests.op_checks import BACKENDS, INTERPRETED, assert_accurate, device_of, load_backend, randn

SEED, BETA, EXAMPLE_OFFSET = -5, 0.7, 3


def make(hidden: tuple[int, ...], activation: str, backend: str, batch: int = 7) -> tuple[VAE, Tensor, Tensor]:
    device = device_of(backend)
    torch.manual_seed(0)
    vae = VAE.mlp(data_shape=(13,), latent_dim=3, hidden=hidden, activation=activation).to(device)
    return vae, randn(batch, 13, seed=1, device=device).sigmoid(), torch.tensor([SEED], device=device)


def reference_loss(vae: VAE, x: Tensor, seed: Tensor, parameters: list[Tensor]) -> Tensor:
    options = _mlp_loss._Options(BETA, EXAMPLE_OFFSET, vae.encoder.activation, len(vae.encoder.layers()))
    return _mlp_loss._reference_loss(x.to(parameters[0].dtype), seed, options, parameters)


def gradients(loss: Tensor, parameters: list[Tensor], **how: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, **how))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    load_backend(request.param)
    monkeypatch.setenv("FASTVAE_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("hidden", [(), (9,), (260, 300)])
def test_loss_and_gradients_are_those_of_the_layers(hidden: tuple[int, ...], activation: str, backend: str) -> None:
    vae, x, seed = make(hidden, activation, backend, batch=20)
    parameters = list(vae.parameters())
    loss, nll, kl = vae(x, seed=seed, beta=BETA, example_offset=EXAMPLE_OFFSET)
    assert type(loss.grad_fn).__name__ == "_MLPLossBackward"
    assert not nll.requires_grad
    assert not kl.requires_grad
    torch.testing.assert_close(loss, nll.mean() + BETA * kl.mean())
    ours = gradients(3.0 * loss, parameters)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    exact = gradients(3.0 * reference_loss(vae, x, seed, wide), wide)
    eager_loss = reference_loss(vae, x, seed, parameters)
    eager = gradients(3.0 * eager_loss, parameters)
    assert_accurate(loss, reference_loss(vae, x, seed, wide), eager_loss)
    for name, a, b, c in zip(dict(vae.named_parameters()), ours, exact, eager):
        # a chain of sums, each in another order than eager's
        assert_accurate(a, b, c, name, factor=4.0)


def test_the_upstream_gradient_is_applied_once_and_a_second_backward_is_the_same(backend: str) -> None:
    vae, x, seed = make((9,), "relu", backend)
    parameters = list(vae.parameters())
    loss = 2.0 * vae(x, seed=seed).loss
    first, second = gradients(loss, parameters, retain_graph=True), gradients(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    again = gradients(vae(x, seed=seed).loss, parameters)
    torch.testing.assert_close(first, [2.0 * g for g in again])


def test_a_differentiated_backward_is_the_references(backend: str) -> None:
    vae, x, seed = make((9,), "tanh", backend)
    parameters = list(vae.parameters())

    def penalty(loss: Tensor) -> list[Tensor]:
        squares = [g.square().sum() for g in gradients(loss, parameters, create_graph=True)]
        return gradients(torch.stack(squares).sum(), parameters)

    loss = vae(x, seed=seed, beta=BETA, example_offset=EXAMPLE_OFFSET).loss
    torch.testing.assert_close(penalty(loss), penalty(reference_loss(vae, x, seed, parameters)))


def test_each_gradient_is_taken_over_not_copied(backend: str) -> None:
    vae, x, seed = make((9,), "relu", backend)
    loss = vae(x, seed=seed).loss
    buffer = loss.grad_fn.gradients[0].untyped_storage().data_ptr()
    loss.backward()
    assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() == buffer for p in vae.parameters())


def test_what_it_is_not_for_takes_the_layers_one_by_one() -> None:
    vae, x, seed = make((9,), "relu", "numba")

    def fused(vae: VAE = vae, x: Tensor = x, **settings: object) -> bool:
        loss = vae(x, seed=seed, **settings).loss
        return type(loss.grad_fn).__name__ == "_MLPLossBackward"

    assert fused()
    assert fused(x=(255 * x).to(torch.uint8))
    assert not fused(x=x.clone().requires_grad_())
    assert not fused(free_bits=0.1)
    assert not fused(objective="iwae", num_samples=2)
    assert not fused(beta=torch.ones(1, requires_grad=True))
    assert not fused(vae=vae.double(), x=x.double())
    vae.float()
    with torch.no_grad():
        assert vae(x, seed=seed).loss.grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused()
    vae.encoder.head.bias.requires_grad_(False)
    assert not fused()
    own = VAE(nn.Linear(13, 6), nn.Linear(3, 13), vae.likelihood, data_shape=(13,), latent_dim=3)
    assert not fused(vae=own)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


class Skipping(MLPDecoder):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + z.sum(-1, keepdim=True)


def own_forward(module: nn.Module, note: Callable[..., None]) -> None:
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        note()
        return plain(x)

    module.forward = forward


# what users do to the parts of a model; `note` is to be called whenever a module is
CHANGES: dict[str, Callable[[VAE, Callable[..., None]], object]] = {
    "forward hook, encoder": lambda vae, note: vae.encoder.register_forward_hook(note),
    "forward hook, decoder": lambda vae, note: vae.decoder.register_forward_hook(note),
    "forward hook, hidden layers": lambda vae, note: vae.decoder.body.register_forward_hook(note),
    "forward hook, activation": lambda vae, note: vae.encoder.body[1].register_forward_hook(note),
    "forward hook, every module": lambda vae, note: register_module_forward_hook(note),
    "pre-hook": lambda vae, note: vae.decoder.body[0].register_forward_pre_hook(note),
    "backward hook": lambda vae, note: vae.decoder.head.register_full_backward_hook(note),
    "backward pre-hook": lambda vae, note: vae.encoder.head.register_full_backward_pre_hook(note),
    "forward of its own": lambda vae, note: own_forward(vae.decoder.head, note),
    "parametrization": lambda vae, note: parametrize.register_parametrization(vae.decoder.head, "weight", Doubled()),
    "pruning": lambda vae, note: prune.random_unstructured(vae.encoder.head, "weight", amount=4),
    "another activation": lambda vae, note: vae.encoder.body.__setitem__(1, nn.GELU()),
    "a layer more": lambda vae, note: vae.decoder.body.append(Doubled()),
    "no bias": lambda vae, note: setattr(vae.encoder, "head", nn.Linear(9, 6, bias=False)),
    "two activations": lambda vae, note: setattr(vae, "decoder", MLPDecoder(3, (9,), 13, "tanh")),
    "subclass": lambda vae, note: setattr(vae, "decoder", Skipping(3, (9,), 13)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_do_more_than_their_weights_are_called(change: str) -> None:
    vae, x, seed = make((9,), "relu", "numba")
    noted: list[str] = []
    handle = CHANGES[change](vae, lambda *_: noted.append(change))
    # modules of another kind are always called
    called = VAE(nn.Sequential(vae.encoder), nn.Sequential(vae.decoder), vae.likelihood, data_shape=(13,), latent_dim=3)
    results = []
    try:
        for model in (vae, called):
            noted.clear()
            loss = model(x, seed=seed).loss
            assert type(loss.grad_fn).__name__ != "_MLPLossBackward"
            nll = model.nll(model.encode(x)[0], x)
            results.append((loss, nll, gradients(loss + nll.sum(), list(vae.parameters())), bool(noted)))
    finally:
        if change == "forward hook, every module":
            handle.remove()
    torch.testing.assert_close(results[0][:3], results[1][:3])
    assert results[0][3] == results[1][3] == ("hook" in change or "forward" in change)


class Scaled(VAE):
    def forward(self, x: Tensor, **settings: Any) -> Loss:
        loss = super().forward(x, **settings)
        return loss._replace(loss=3.0 * loss.loss)


# what a backward does beside making gradients
BACKWARDS: dict[str, Callable[[VAE], object]] = {
    "nothing": lambda vae: None,
    "gradient hook": lambda vae: vae.encoder.head.weight.register_hook(lambda grad: 2.0 * grad),
    "accumulated": lambda vae: vae.encoder.head.weight.register_post_accumulate_grad_hook(
        lambda p: p.__setattr__("grad", 2 * p.grad)
    ),
    "tied weights": lambda vae: setattr(vae.decoder.body[2], "weight", vae.encoder.body[2].weight),
    "forward hook": lambda vae: vae.register_forward_hook(lambda *a: a[2]._replace(loss=3.0 * a[2].loss)),
    "subclass": lambda vae: setattr(vae, "__class__", Scaled),
}


@pytest.mark.parametrize("change", BACKWARDS)
def test_written_gradients_are_those_of_a_backward(change: str) -> None:
    vae, x, seed = make((9, 9), "relu", "numba")
    BACKWARDS[change](vae)
    vae(x, seed=seed).loss.backward()
    expected = [p.grad.clone() for p in vae.parameters()]
    loss, _, _ = vae.write_gradients(x, seed=seed)
    assert loss is None or loss.grad_fn is None
    torch.testing.assert_close([p.grad for p in vae.parameters()], expected)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 20), (33, 1000), (5, 9000)])
def test_activation_gradient_and_its_column_sums(shape: tuple[int, int], activation: str, backend: str) -> None:
    if INTERPRETED and backend == "triton" and shape[1] > 1000:
        pytest.skip("a wide tile is Numba's own affair, and slow in the interpreter")
    kernels = load_backend(backend)
    device = device_of(backend)
    dy, pre = randn(*shape, seed=2, device=device), randn(*shape, seed=3, device=device)
    derivative = {"none": torch.ones_like(pre), "relu": (pre > 0).float(), "tanh": 1.0 - pre.tanh().square()}
    y = {"none": pre, "relu": pre.relu(), "tanh": pre.tanh()}[activation]
    expected = dy * derivative[activation]
    result, sums = kernels.activation_bwd_(dy, y, activation)
    assert result is dy
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert_accurate(sums, expected.double().sum(0), expected.sum(0))


@pytest.mark.parametrize("inputs", [20, 300])
@pytest.mark.parametrize("outputs", [3, 40, 70])
def test_a_hidden_layers_backward_is_that_of_its_parts(outputs: int, inputs: int, backend: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    dy, y = randn(50, outputs, seed=1, device=device), randn(50, inputs, seed=2, device=device).relu()
    weight, dweight = randn(outputs, inputs, seed=3, device=device), torch.empty(outputs, inputs, device=device)
    out = torch.empty(inputs, device=device)
    sums = kernels.ColumnSums([out], 50)
    # partial losses, or whole ones
    nll = torch.ones(*[3][: backend == "triton"], 50, device=device)
    dx = kernels.hidden_bwd(dy.clone(), y, weight, "relu", dweight, sums.parts[0])
    assert torch.equal(sums.finish(nll), nll.view(-1, 50).sum(0))
    exact = (dy.double() @ weight.double()) * (y > 0)
    assert_accurate(dx, exact, (dy @ weight) * (y > 0), factor=4.0)
    assert_accurate(out, exact.sum(0), ((dy @ weight) * (y > 0)).sum(0), factor=4.0)
    assert_accurate(dweight, dy.double().t() @ y.double(), dy.t() @ y)


@pytest.mark.parametrize("adjacent", [True, False])
def test_column_sums_of_all_layers_are_made_at_once(adjacent: bool) -> None:
    kernels, device = load_backend("triton"), device_of("triton")
    widths, B = (5, 12, 33), 70
    whole = torch.full((60,), float("nan"), device=device)
    outs = [part.view(-1) for part in whole[1 : 1 + sum(widths)].split(widths)]
    if not adjacent:
        outs = outs[::-1]
    given = [randn(B, out.numel(), seed=n, device=device) for n, out in enumerate(outs)]
    sums = kernels.ColumnSums(outs, B)
    assert sums.adjacent == adjacent
    for dy, part in zip(given, sums.parts):
        kernels.activation_bwd_(dy, dy, "none", part)
    sums.finish(torch.zeros(1, B, device=device))
    for dy, out in zip(given, outs):
        assert_accurate(out, dy.double().sum(0), dy.sum(0), factor=4.0)
    # nothing beside them was written
    assert whole.isnan().sum() == 60 - sum(widths)


def test_latent_gradients_leave_their_column_sums(backend: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    B, L = 70, 5
    dz, mu, logvar = (randn(B, L, seed=n, device=device) for n in range(3))
    seed, dkl = torch.tensor([SEED], device=device), torch.tensor(0.3, device=device).expand(B)
    out = torch.empty(2 * L, device=device)
    sums = kernels.ColumnSums([out], B)
    dmu, dlogvar = kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, seed, 3, 0, column_sum=sums.parts[0])
    expected = kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, seed, 3, 0)
    assert torch.equal(dmu, expected[0])
    assert torch.equal(dlogvar, expected[1])
    sums.finish(torch.zeros(1, B, device=device))
    assert_accurate(out, torch.cat(expected, 1).double().sum(0), torch.cat(expected, 1).sum(0), factor=4.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_likelihood_reads_its_rows_from_the_data_set(dtype: torch.dtype) -> None:
    kernels, device = load_backend("triton"), device_of("triton")
    data = torch.randint(0, 256, (90, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    data = data if dtype == torch.uint8 else data / 255
    index, logits = torch.arange(89, -1, -3, device=device), randn(30, 36, seed=1, device=device)
    weight = torch.tensor(0.1, device=device).expand(30)
    ours = kernels.bernoulli_nll_with_grad(logits, data, weight, None, 0, True, index=index)
    expected = kernels.bernoulli_nll_with_grad(logits, data[index], weight, None, 0, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_under_bfloat16_it_is_as_exact_as_autocast_of_the_layers(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backend("triton")
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    vae, x, seed = make((40, 30), activation, "triton", batch=50)
    parameters = list(vae.parameters())

    def autocast_loss() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return vae(x, seed=seed, beta=BETA, example_offset=EXAMPLE_OFFSET).loss

    loss = autocast_loss()
    assert type(loss.grad_fn).__name__ == "_MLPLossBackward"
    ours = gradients(loss, parameters)
    monkeypatch.setattr("fastvae.models.mlp_loss", lambda *_, **__: None)
    layers_loss = autocast_loss()
    layers = gradients(layers_loss, parameters)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    exact_loss = reference_loss(vae, x, seed, wide)
    exact = gradients(exact_loss, wide)
    assert ours[0].dtype == torch.float32
    # one unit of bfloat16; the interpreter cuts where a GPU rounds, which doubles it
    unit = 2.0**-8 * (2 if INTERPRETED else 1)
    assert abs(loss.item() - exact_loss.item()) <= 2 * abs(layers_loss.item() - exact_loss.item()) + unit * 10
    for name, a, b, c in zip(dict(vae.named_parameters()), ours, exact, layers):
        error, eager = (a - b).norm() / b.norm(), (c - b).norm() / b.norm()
        assert error <= 2 * eager + unit, f"{name}: {error:.4f}, layer by layer {eager:.4f}"

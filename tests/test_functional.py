"""The public ops: what the edge refuses, where the dispatcher sends tensors, and how they compose with torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae import functional as F
from fastvae import reference

SEED = torch.tensor([11])


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype, requires_grad=True), torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.kl_standard_normal(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), "int64"),
        (lambda: F.kl_standard_normal(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\].*\[2, 4\]"),
        (lambda: F.kl_standard_normal(torch.zeros(()), torch.zeros(())), "event"),
        (lambda: F.kl_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), "meta"),
        (lambda: F.reparameterize(torch.zeros(2, 3), torch.zeros(2, 3), num_samples=0), "num_samples >= 1, got 0"),
        (lambda: F.reparameterize(torch.zeros(2, 3), torch.zeros(2, 3), seed=torch.tensor([1.0])), "seed int64"),
        (
            lambda: F.reparameterize(torch.zeros(2, 3), torch.zeros(2, 3), seed=SEED, generator=torch.Generator()),
            "got both",
        ),
        (lambda: F.bernoulli_nll(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32)), "int32"),
        (lambda: F.bernoulli_nll(torch.zeros(2, 3), torch.zeros(5, 3)), "must broadcast"),
        (lambda: F.bernoulli_nll(torch.zeros(2, 3), torch.zeros(4, 2, 3)), "must broadcast"),
        (lambda: F.gaussian_nll(torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 3)), "do not broadcast"),
        (
            lambda: F.bernoulli_nll_loss(torch.zeros(2, 3), torch.zeros(2, 3), weight=torch.ones(3)),
            r"row weights must broadcast to \[2\]",
        ),
        (
            lambda: F.bernoulli_nll_loss(
                torch.zeros(2, 3), torch.zeros(2, 3), weight=torch.ones(2, requires_grad=True)
            ),
            "no gradient",
        ),
        (
            lambda: F.linear_bernoulli_nll_loss(
                torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(5), torch.zeros(2, 5)
            ),
            r"weight \[D, H\]",
        ),
        (lambda: F.negative_elbo(torch.zeros(2, 3, 4), torch.zeros(4)), r"nll \[B\] or \[K, B\]"),
        (lambda: F.iwae_bound(torch.zeros(3, 4), torch.zeros(4)), r"\[K, B\]"),
        (lambda: F.gather_batch(torch.zeros(3, 4), torch.tensor([0]), transform="sharpen"), "unknown transform"),
        (lambda: F.gather_batch(torch.zeros(3, 4), torch.tensor([0]), transform="binarize"), "expected a seed"),
        (
            lambda: F.gather_batch(torch.zeros(3, 4), torch.tensor([0]), transform="dequantize", seed=SEED),
            "uint8",
        ),
    ],
)
def test_the_edge_says_what_it_got(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# every op that takes several tensors, with their shapes in order
MANY_TENSORS: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "reparameterize": (lambda m, v: F.reparameterize(m, v, seed=SEED), [(2, 3)] * 2),
    "kl_standard_normal": (F.kl_standard_normal, [(2, 3)] * 2),
    "kl_normal": (F.kl_normal, [(2, 3)] * 4),
    "reparameterize_kl": (lambda m, v: F.reparameterize_kl(m, v, seed=SEED), [(2, 3)] * 2),
    "reparameterize_log_ratio": (
        lambda m, v: F.reparameterize_log_ratio(m, v, num_samples=2, seed=SEED),
        [(2, 3)] * 2,
    ),
    "bernoulli_nll": (F.bernoulli_nll, [(2, 3)] * 2),
    "bernoulli_nll_loss": (lambda o, x, w: F.bernoulli_nll_loss(o, x, weight=w), [(2, 3), (2, 3), (2,)]),
    "gaussian_nll": (F.gaussian_nll, [(2, 3)] * 3),
    "gaussian_nll_loss": (lambda m, v, x, w: F.gaussian_nll_loss(m, v, x, weight=w), [(2, 3)] * 3 + [(2,)]),
    "linear_bernoulli_nll": (F.linear_bernoulli_nll, [(2, 3), (4, 3), (4,), (2, 4)]),
    "linear_bernoulli_nll_loss": (F.linear_bernoulli_nll_loss, [(2, 3), (4, 3), (4,), (2, 4)]),
    "linear_gaussian_nll": (F.linear_gaussian_nll, [(2, 3), (8, 3), (8,), (2, 4)]),
    "linear_gaussian_nll_loss": (F.linear_gaussian_nll_loss, [(2, 3), (8, 3), (8,), (2, 4)]),
    "gather_batch": (lambda x, i: F.gather_batch(x, i.long()), [(5, 3), (2,)]),
}


@pytest.mark.parametrize("op", MANY_TENSORS)
def test_tensors_of_two_devices_are_refused(op: str) -> None:
    call, sizes = MANY_TENSORS[op]
    for stray in range(len(sizes)):
        devices = ["meta" if i == stray else "cpu" for i in range(len(sizes))]
        tensors = [torch.zeros(size, device=device) for size, device in zip(sizes, devices)]
        tensors[0].requires_grad_(op != "gather_batch")
        with pytest.raises(ValueError, match="meta"):
            call(*tensors)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTVAE_BACKEND is 'cuda', expected one of auto, triton, numba, reference"):
        F.kl_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3))


def test_the_dispatcher_says_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    mu, logvar = pair(2, 3)
    assert F.choose_backend("reparameterize_kl", mu, logvar)[0].__name__ == "fastvae_cpu_kernels"
    package, reason = F.choose_backend("reparameterize_kl", mu.double(), logvar.double())
    assert package is None
    assert "float64" in reason
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    assert F.choose_backend("reparameterize_kl", mu, logvar)[0].__name__ == "fastvae_kernels"
    monkeypatch.setenv("FASTVAE_BACKEND", "reference")
    assert F.choose_backend("reparameterize_kl", mu, logvar)[0] is None


def test_manual_seed_is_obeyed() -> None:
    mu, logvar = pair(4, 3)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(F.reparameterize(mu, logvar))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator()
    again = [F.reparameterize(mu, logvar, generator=generator.manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_samples_broadcast_against_data_without_a_copy() -> None:
    logits, x = torch.randn(5, 2, 3), torch.rand(2, 3)
    torch.testing.assert_close(F.bernoulli_nll(logits, x), reference.bernoulli_nll(logits, x))
    torch.testing.assert_close(
        F.gaussian_nll(logits, torch.tensor(0.3), x), reference.gaussian_nll(logits, torch.tensor(0.3), x)
    )


OPS = {
    "reparameterize": lambda m, v: F.reparameterize(m, v, seed=SEED),
    "kl_standard_normal": F.kl_standard_normal,
    "kl_normal": lambda m, v: F.kl_normal(m, v, v, m),
    "reparameterize_kl": lambda m, v: F.reparameterize_kl(m, v, seed=SEED)[0].sum(-1) + F.kl_standard_normal(m, v),
    "reparameterize_log_ratio": lambda m, v: F.reparameterize_log_ratio(m, v, num_samples=2, seed=SEED)[1],
    "bernoulli_nll": lambda m, v: F.bernoulli_nll(m * v, torch.full((4, 3), 0.25)),
    "gaussian_nll": lambda m, v: F.gaussian_nll(m, v, torch.full((4, 3), 0.25)),
}
REFERENCE = {
    "reparameterize": lambda m, v: reference.reparameterize(m, v, SEED),
    "kl_standard_normal": reference.kl_standard_normal,
    "kl_normal": lambda m, v: reference.kl_normal(m, v, v, m),
    "reparameterize_kl": lambda m, v: reference.reparameterize(m, v, SEED).sum(-1) + reference.kl_standard_normal(m, v),
    "reparameterize_log_ratio": lambda m, v: reference.reparameterize_log_ratio(m, v, SEED, num_samples=2)[1],
    "bernoulli_nll": lambda m, v: reference.bernoulli_nll(m * v, torch.full((4, 3), 0.25)),
    "gaussian_nll": lambda m, v: reference.gaussian_nll(m, v, torch.full((4, 3), 0.25)),
}


@pytest.fixture(params=["numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTVAE_BACKEND", request.param)
    return str(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", OPS)
class TestComposition:
    def test_double_backward(self, op: str) -> None:
        inputs = pair(4, 3)

        def penalty(call: object) -> tuple[Tensor, ...]:
            first = torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)  # type: ignore[operator]
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)

        torch.testing.assert_close(penalty(OPS[op]), penalty(REFERENCE[op]), rtol=1e-4, atol=1e-5)

    def test_function_transforms(self, op: str) -> None:
        mu, logvar = (t.detach() for t in pair(4, 3))
        call, expected = OPS[op], REFERENCE[op]
        torch.testing.assert_close(
            torch.func.grad(lambda m: call(m, logvar).sum())(mu),
            torch.func.grad(lambda m: expected(m, logvar).sum())(mu),
        )
        tangents = (torch.ones_like(mu), torch.ones_like(mu))
        torch.testing.assert_close(
            torch.func.jvp(call, (mu, logvar), tangents), torch.func.jvp(expected, (mu, logvar), tangents)
        )

    def test_forward_mode(self, op: str) -> None:
        mu, logvar = (t.detach() for t in pair(4, 3))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(mu, torch.ones_like(mu))
            got, expected = (torch.autograd.forward_ad.unpack_dual(f[op](dual, logvar)) for f in (OPS, REFERENCE))
            torch.testing.assert_close(got.tangent, expected.tangent)

    def test_only_one_input_needs_a_gradient(self, op: str) -> None:
        mu, logvar = pair(4, 3)
        (got,) = torch.autograd.grad(OPS[op](mu, logvar.detach()).sum(), mu)
        (expected,) = torch.autograd.grad(REFERENCE[op](mu, logvar.detach()).sum(), mu)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_float64_is_computed_in_float64(self, op: str) -> None:
        mu, logvar = pair(4, 3, dtype=torch.float64)
        result = OPS[op](mu, logvar)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, REFERENCE[op](mu, logvar), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("backend")
class TestOnePassLosses:
    """The training forms against their two-pass meaning."""

    weight = torch.tensor([0.5, 0.1, 2.0, 0.25])

    def test_bernoulli(self) -> None:
        logits, x = torch.randn(4, 33, requires_grad=True), torch.rand(4, 33)
        loss, nll = F.bernoulli_nll_loss(logits, x, weight=self.weight)
        expected = (self.weight * reference.bernoulli_nll(logits, x)).sum()
        torch.testing.assert_close(loss, expected)
        assert not nll.requires_grad
        got, want = (torch.autograd.grad(3.0 * value, logits)[0] for value in (loss, expected))
        torch.testing.assert_close(got, want)

    def test_gaussian(self) -> None:
        mu, logvar = pair(4, 33)
        x = torch.rand(4, 33)
        loss, _ = F.gaussian_nll_loss(mu, logvar, x, weight=self.weight)
        expected = (self.weight * reference.gaussian_nll(mu, logvar, x)).sum()
        torch.testing.assert_close(loss, expected)
        got, want = (torch.autograd.grad(3.0 * value, (mu, logvar)) for value in (loss, expected))
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("shape", [(4, 33), (33,), ()], ids=str)
    def test_gaussian_with_a_floor(self, shape: tuple[int, ...]) -> None:
        """Raw log-variances in, both passes and one, and differentiated twice."""
        mu, x = torch.randn(4, 33, requires_grad=True), torch.rand(4, 33)
        raw = torch.randn(shape, requires_grad=True)
        logvar = -0.5 + torch.nn.functional.softplus(raw + 0.5)
        expected = reference.gaussian_nll(mu, logvar, x).mean()
        for value in (
            F.gaussian_nll(mu, raw, x, logvar_floor=-0.5).mean(),
            F.gaussian_nll_loss(mu, raw, x, logvar_floor=-0.5)[0],
        ):
            torch.testing.assert_close(value, expected)
            got, want = (torch.autograd.grad(v, (mu, raw), create_graph=True) for v in (value, expected))
            torch.testing.assert_close(got, want)
            seconds = [
                torch.autograd.grad(first[1].square().sum(), (mu, raw), retain_graph=True) for first in (got, want)
            ]
            torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)
            plain = torch.autograd.grad(value, (mu, raw), retain_graph=True)
            torch.testing.assert_close(plain, want)

    def test_of_no_rows_the_mean_is_0(self) -> None:
        logits = torch.zeros(0, 3, requires_grad=True)
        for loss, _ in (
            F.bernoulli_nll_loss(logits, logits.detach()),
            F.gaussian_nll_loss(logits, logits, logits.detach()),
        ):
            assert loss.item() == 0.0
            assert torch.autograd.grad(loss, logits)[0].shape == (0, 3)

    def test_shared_logvar(self) -> None:
        mu, x = torch.randn(4, 33, requires_grad=True), torch.rand(4, 33)
        for shape in ((), (33,)):
            logvar = torch.randn(shape, requires_grad=True)
            loss, _ = F.gaussian_nll_loss(mu, logvar, x)
            expected = reference.gaussian_nll(mu, logvar, x).mean()
            got, want = (torch.autograd.grad(value, (mu, logvar)) for value in (loss, expected))
            torch.testing.assert_close(got, want)

    def test_output_layer(self) -> None:
        h, weight = torch.randn(2, 4, 9, requires_grad=True), torch.randn(33, 9, requires_grad=True)
        bias, x = torch.randn(33, requires_grad=True), torch.rand(4, 33)
        loss, nll = F.linear_bernoulli_nll_loss(h, weight, bias, x, row_weight=self.weight)
        reference_nll = reference.bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x)
        expected = (self.weight * reference_nll).sum()
        torch.testing.assert_close(nll, reference_nll.detach())
        got, want = (torch.autograd.grad(3.0 * value, (h, weight, bias)) for value in (loss, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("floor", [None, -0.5])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_gaussian_output_layer(self, weighted: bool, floor: float | None) -> None:
        h, weight = torch.randn(2, 4, 9, requires_grad=True), torch.randn(66, 9, requires_grad=True)
        bias, x = torch.randn(66, requires_grad=True), torch.rand(4, 33)
        row_weight = self.weight if weighted else None
        loss, nll = F.linear_gaussian_nll_loss(h, weight, bias, x, row_weight=row_weight, logvar_floor=floor)
        mu, logvar = torch.nn.functional.linear(h, weight, bias).chunk(2, dim=-1)
        if floor is not None:
            logvar = floor + torch.nn.functional.softplus(logvar - floor)
        reference_nll = reference.gaussian_nll(mu, logvar, x)
        expected = (self.weight * reference_nll).sum() if weighted else reference_nll.mean()
        torch.testing.assert_close(nll, reference_nll.detach())
        torch.testing.assert_close(loss, expected)
        got, want = (torch.autograd.grad(3.0 * value, (h, weight, bias)) for value in (loss, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_a_second_backward_does_not_scale_twice(self) -> None:
        logits, x = torch.randn(4, 33, requires_grad=True), torch.rand(4, 33)
        h, weight, bias = torch.randn(4, 9, requires_grad=True), torch.randn(33, 9), torch.randn(33)
        mu, logvar = pair(4, 33)
        for loss, leaf in (
            (F.bernoulli_nll_loss(logits, x)[0], logits),
            (F.linear_bernoulli_nll_loss(h, weight, bias, x)[0], h),
            (F.linear_gaussian_nll_loss(h, weight[1:], bias[1:], x[:, :16], logvar_floor=-1.0)[0], h),
            (F.gaussian_nll_loss(mu, logvar, x)[0], mu),
        ):
            first, second = (torch.autograd.grad(5.0 * loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
            torch.testing.assert_close(first, second)

    def test_double_backward(self) -> None:
        h, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 9), (33, 9), (33,)))
        mu, logvar = pair(4, 33)
        x = torch.rand(4, 33)
        cases = [
            (F.bernoulli_nll_loss(mu, x)[0], reference.bernoulli_nll(mu, x).mean(), (mu,)),
            (F.gaussian_nll_loss(mu, logvar, x)[0], reference.gaussian_nll(mu, logvar, x).mean(), (mu, logvar)),
            (
                F.linear_bernoulli_nll_loss(h, weight, bias, x)[0],
                reference.bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x).mean(),
                (h, weight, bias),
            ),
            (
                F.linear_gaussian_nll_loss(h, weight[1:], bias[1:], x[:, :16])[0],
                reference.gaussian_nll(
                    *torch.nn.functional.linear(h, weight[1:], bias[1:]).chunk(2, dim=-1), x[:, :16]
                ).mean(),
                (h, weight, bias),
            ),
        ]
        for loss, expected, leaves in cases:
            seconds = []
            for value in (loss, expected):
                first = torch.autograd.grad(value, leaves, create_graph=True)
                penalty = sum(grad.square().sum() for grad in first)
                seconds.append(torch.autograd.grad(penalty, leaves))
            torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)

    def test_without_a_gradient_there_is_no_gradient(self) -> None:
        logits, x = torch.randn(4, 33), torch.rand(4, 33)
        loss, nll = F.bernoulli_nll_loss(logits, x)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, nll.mean())

    def test_a_gradient_for_the_data_comes_from_the_reference(self) -> None:
        logits, x = torch.randn(4, 33), torch.rand(4, 33, requires_grad=True)
        for value in (F.bernoulli_nll(logits, x).sum(), 4 * F.bernoulli_nll_loss(logits, x)[0]):
            torch.testing.assert_close(torch.autograd.grad(value, x)[0], -logits)


def test_losses_are_float32_in_and_out_of_autocast() -> None:
    mu, logvar = pair(4, 3)
    layer = torch.nn.Linear(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(mu)
        assert half.dtype == torch.bfloat16
        assert F.kl_standard_normal(*half.chunk(2, -1)).dtype == torch.float32
        assert F.kl_standard_normal(mu, logvar).dtype == torch.float32
        z, kl = F.reparameterize_kl(*half.chunk(2, -1), seed=SEED)
        assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
        # inputs of two types meet in the wider one
        assert F.reparameterize(half[:, :3], logvar, seed=SEED).dtype == torch.float32
        loss, _ = F.linear_bernoulli_nll_loss(mu, layer.weight, layer.bias, torch.rand(4, 6))
        assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_compositions() -> None:
    nll, kl = torch.rand(5, 4), torch.rand(4)
    torch.testing.assert_close(F.negative_elbo(nll, kl, beta=0.5), nll.mean(0) + 0.5 * kl)
    torch.testing.assert_close(F.negative_elbo(nll[0], kl), nll[0] + kl)
    log_ratio = torch.randn(5, 4)
    expected = torch.log(torch.exp(log_ratio - nll).mean(0))
    torch.testing.assert_close(F.iwae_bound(nll, log_ratio), expected)

"""The ops under torch.compile, torch.export and fake tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastvae import functional as F

# torch's own: Dynamo instantiates the Function that it traces
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SEED = torch.tensor([5])
X8 = torch.randint(0, 256, (6, 12), dtype=torch.uint8)
OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "reparameterize": lambda m, v: F.reparameterize(m, v, num_samples=3, seed=SEED),
    "kl_standard_normal": F.kl_standard_normal,
    "kl_normal": lambda m, v: F.kl_normal(m, v, 0.5 * v, m.flip(0)),
    "reparameterize_kl": lambda m, v: F.reparameterize_kl(m, v, seed=SEED),
    "reparameterize_kl_per_dim": lambda m, v: F.reparameterize_kl_per_dim(m, v, seed=SEED)[:2],
    "reparameterize_log_ratio": lambda m, v: F.reparameterize_log_ratio(m, v, num_samples=3, seed=SEED),
    "bernoulli_nll": lambda m, v: F.bernoulli_nll(m * v, X8[: len(m)]),
    "bernoulli_nll binarized": lambda m, v: F.bernoulli_nll(m * v, X8[: len(m)], binarize_seed=SEED),
    "gaussian_nll": lambda m, v: F.gaussian_nll(m, v, X8[: len(m)]),
    "bernoulli_nll_loss": lambda m, v: F.bernoulli_nll_loss(m * v, X8[: len(m)])[0],
    "gaussian_nll_loss": lambda m, v: F.gaussian_nll_loss(m, v, X8[: len(m)])[0],
    "linear_bernoulli_nll": lambda m, v: F.linear_bernoulli_nll(m, v.t() @ v, v[0], X8[: len(m)]),
    "linear_bernoulli_nll_loss": lambda m, v: F.linear_bernoulli_nll_loss(m, v.t() @ v, v[0], X8[: len(m)])[0],
    "linear_gaussian_nll_loss": lambda m, v: F.linear_gaussian_nll_loss(
        m, v.t() @ v, v[0], X8[: len(m), :6], logvar_floor=-1.0
    )[0],
}


def inputs(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 12, requires_grad=True), torch.randn(rows, 12, requires_grad=True)


def total(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return sum((part * torch.linspace(0.5, 1.5, part.numel()).view(part.shape)).sum() for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("op", OPS)
def test_fullgraph_compile_is_eager(op: str) -> None:
    torch._dynamo.reset()
    mu, logvar = inputs()
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mu, logvar), OPS[op](mu, logvar))
    got, expected = (torch.autograd.grad(total(call(mu, logvar)), (mu, logvar)) for call in (compiled, OPS[op]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", ["reparameterize_kl", "bernoulli_nll"])
def test_batch_sizes_do_not_recompile(op: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[op], fullgraph=True, backend=counter)
    for rows in (6, 5, 4, 3):
        mu, logvar = inputs(rows)
        torch.testing.assert_close(compiled(mu, logvar), OPS[op](mu, logvar))
    # once for the first size, once for any size
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", OPS)
def test_export(op: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, mu: Tensor, logvar: Tensor) -> Any:
            return OPS[op](mu, logvar)

    mu, logvar = (t.detach() for t in inputs())
    program = torch.export.export(Module(), (mu, logvar), strict=False)
    assert any("fastvae" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(mu, logvar), OPS[op](mu, logvar))


def library_calls() -> dict[str, tuple[Any, ...]]:
    mu, logvar = (t.detach() for t in inputs())
    loss, z3, loss3 = torch.rand(6), torch.randn(3, 6, 12), torch.rand(3, 6)
    weight = torch.full((), 0.5).expand(6)
    return {
        "reparameterize_fwd": (mu, logvar, SEED, 3, 0, 0, 0),
        "reparameterize_bwd": (z3, logvar, SEED, 3, 0, 0, 0),
        "kl_standard_normal_fwd": (mu, logvar),
        "kl_standard_normal_bwd": (loss, mu, logvar),
        "kl_normal_fwd": (mu, logvar, logvar, mu),
        "kl_normal_bwd": (loss, mu, logvar, logvar, mu),
        "reparameterize_kl_fwd": (mu, logvar, SEED, 0, 0, True),
        "reparameterize_kl_bwd": (mu, loss, mu, logvar, SEED, 0, 0),
        "reparameterize_log_ratio_fwd": (mu, logvar, SEED, 3, 0, 0),
        "reparameterize_log_ratio_bwd": (z3, loss3, mu, logvar, SEED, 3, True, 0, 0),
        "bernoulli_nll_fwd": (mu, X8, None, 0),
        "bernoulli_nll_bwd": (loss, mu, X8, SEED, 0),
        "bernoulli_nll_with_grad": (mu, X8, weight, None, 0, True),
        "gaussian_nll_fwd": (mu, logvar, X8),
        "gaussian_nll_bwd": (loss, mu, logvar, X8),
        "gaussian_nll_with_grad": (mu, logvar, X8, weight, True),
        "gather_batch": (X8, torch.tensor([1, 1, 4]), "binarize", SEED, 0, torch.float32),
    }


@pytest.mark.parametrize("operator", library_calls())
def test_opcheck(operator: str) -> None:
    import fastvae._library  # noqa: F401 (registers the operators)

    torch.library.opcheck(getattr(torch.ops.fastvae, operator), library_calls()[operator])


VISIBLE = """
import sys, torch, torch.utils._triton
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
sys.path.insert(0, sys.argv[1])
# Dynamo looks for Triton kernels only where a GPU is; nothing is run here
torch.utils._triton.has_triton = lambda *args: True
from test_compile import OPS, inputs

class Seen(Exception):
    pass

def backend(module, _):
    graphs = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    code = "".join(m.print_readable(print_output=False) for m in graphs)
    raise Seen(code.count("triton_kernel_wrapper_mutation("))

for name, op in OPS.items():
    torch._dynamo.reset()
    try:
        torch.compile(op, fullgraph=True, backend=backend)(*inputs())
    except Exception as error:
        while not isinstance(error, Seen):
            if error.__cause__ is None and error.__context__ is None:
                raise
            error = error.__cause__ or error.__context__
        print(name, error.args[0], sep=": ")
"""


def test_the_triton_kernels_stay_visible_to_the_compiler() -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"PYTHONPATH": path, "FASTVAE_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", VISIBLE, os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert counts.keys() >= OPS.keys()
    # at least one kernel in the forward and one in the backward of each
    assert {name: count for name, count in counts.items() if name in OPS and int(count) < 1} == {}

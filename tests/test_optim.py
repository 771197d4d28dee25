"""Our Adam is torch's: the same steps, the same state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvae.optim import Adam
from tests.op_checks import assert_accurate, randn

SHAPES = [(17, 1000), (17,), (1,), (3, 5)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=n, device="cpu").to(dtype)) for n, shape in enumerate(SHAPES)]


def take_steps(optimizer: torch.optim.Optimizer, given: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for n, p in enumerate(given):
            p.grad = randn(*p.shape, seed=100 * step + n, device="cpu", scale=10.0 ** (n - 3)).to(p.dtype)
        if step % 3 == 0:
            # takes fewer steps than the others
            given[2].grad = None
        optimizer.step()


def run(kind: str, weight_decay: float, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    given = parameters(dtype)
    lr = torch.tensor(0.01)
    make = Adam if kind == "ours" else torch.optim.Adam
    take_steps(make(given, lr=lr, weight_decay=weight_decay), given, range(1, 8))
    return given


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs(weight_decay: float) -> None:
    ours, eager = run("ours", weight_decay), run("torch", weight_decay)
    exact = run("torch", weight_decay, torch.float64)
    for a, b, c in zip(ours, exact, eager):
        assert_accurate(a.detach(), b.detach(), c.detach())


def test_either_goes_on_from_the_others_state() -> None:
    ours, theirs = parameters(), parameters()
    first, second = Adam(ours, lr=torch.tensor(0.01)), torch.optim.Adam(theirs, lr=torch.tensor(0.01), fused=True)
    take_steps(first, ours, range(1, 4))
    take_steps(second, theirs, range(1, 4))
    states = copy.deepcopy([first.state_dict()["state"], second.state_dict()["state"]])
    assert states[0].keys() == states[1].keys()
    assert states[0][0].keys() == states[1][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    for optimizer, state in zip((first, second), reversed(states)):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    take_steps(first, ours, range(4, 6))
    take_steps(second, theirs, range(4, 6))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_the_learning_rate_is_read_at_each_step() -> None:
    given = parameters()
    lr = torch.tensor(0.01)
    optimizer = Adam(given, lr=lr)
    lr.zero_()
    before = [p.detach().clone() for p in given]
    take_steps(optimizer, given, range(1, 2))
    assert all(torch.equal(p, b) for p, b in zip(given, before))


def test_what_the_kernel_cannot_take_is_left_to_torch() -> None:
    given = [nn.Parameter(torch.ones(4, 6).t())]
    optimizer = Adam(given, lr=torch.tensor(0.01))
    given[0].grad = torch.ones(6, 4)
    optimizer.step()
    torch.testing.assert_close(given[0].detach(), torch.full((6, 4), 0.99))


def test_a_graph_of_the_old_values_is_noticed() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    Adam([p], lr=torch.tensor(0.01)).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

"""Our Adam is torch's: the same steps, the same state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvae.flat_adam import FlatAdam, can_be_flat
from fastvae.optim import Adam
from tests.op_checks import DEVICE, assert_accurate, load_backend, randn

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


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    load_backend("triton")
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")


def flat_pair(weight_decay: float = 0.1) -> tuple[list[nn.Parameter], FlatAdam, list[nn.Parameter], torch.optim.Adam]:
    """The same parameters twice, with our optimiser and with torch's."""
    ours, theirs = ([nn.Parameter(p.detach().to(DEVICE)) for p in parameters()] for _ in range(2))
    lr = torch.tensor(0.01, device=DEVICE)
    assert can_be_flat(ours)
    adam = torch.optim.Adam(theirs, lr=lr, weight_decay=weight_decay, fused=True)
    return ours, FlatAdam(ours, lr=lr, eps=1e-8, weight_decay=weight_decay), theirs, adam


def take_pairs(pair: tuple[list[nn.Parameter], FlatAdam, list[nn.Parameter], torch.optim.Adam], steps: range) -> None:
    """Steps with the same gradients; where the buffer has a place for them, and elsewhere."""
    ours, flat_adam, theirs, adam = pair
    for step in steps:
        for p in ours:
            p.grad = torch.empty_like(p)
        if step % 2:
            flat_adam.lend_gradients()
        for n, (p, q) in enumerate(zip(ours, theirs)):
            q.grad = randn(*q.shape, seed=100 * step + n, device=DEVICE, scale=10.0 ** (n - 3))
            assert p.grad is not None
            p.grad.copy_(q.grad)
        flat_adam.step()
        adam.step()


@pytest.mark.usefixtures("flat")
def test_steps_in_one_buffer_are_torchs() -> None:
    pair = flat_pair()
    before = [p.detach().clone() for p in pair[0]]
    take_pairs(pair, range(1, 8))
    for p, q, b in zip(pair[0], pair[2], before):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, b)
    storages = {p.untyped_storage().data_ptr() for p in pair[0]}
    assert storages == {pair[1].parameters.untyped_storage().data_ptr()}


@pytest.mark.usefixtures("flat")
def test_state_in_one_buffer_is_torchs_state() -> None:
    pair = flat_pair()
    take_pairs(pair, range(1, 4))
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (pair[1], pair[3])]
    for n, state in states[0]["state"].items():
        torch.testing.assert_close(state, states[1]["state"][n], rtol=1e-5, atol=1e-9)
    # a new one goes on from there, as does torch's from ours
    again = flat_pair()
    with torch.no_grad():
        for p, q in zip(again[0] + again[2], pair[0] + pair[2]):
            p.copy_(q)
    again[1].load_state_dict(states[1])
    again[3].load_state_dict(states[0])
    take_pairs(pair, range(4, 7))
    take_pairs(again, range(4, 7))
    for p, q in zip(pair[0] + pair[2], again[0] + again[2]):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("flat")
def test_a_parameter_without_a_gradient_does_not_take_the_step() -> None:
    ours, flat_adam, theirs, adam = pair = flat_pair()
    take_pairs(pair, range(1, 3))
    for missing in (True, False, False):
        for n, (p, q) in enumerate(zip(ours, theirs)):
            q.grad = None if missing and n == 2 else torch.ones_like(q)
            p.grad = q.grad
        flat_adam.step()
        adam.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert [int(flat_adam.state_dict()["state"][n]["step"]) for n in range(4)] == [5, 5, 4, 5]


@pytest.mark.usefixtures("flat")
def test_the_trainer_counts_the_steps() -> None:
    ours, flat_adam, _, _ = flat_pair()
    taken = torch.tensor([6], device=DEVICE)
    flat_adam.count_with(taken)
    for p in ours:
        p.grad = torch.ones_like(p)
    flat_adam.step()
    assert int(taken) == 6
    assert int(flat_adam.state_dict()["state"][0]["step"]) == 6

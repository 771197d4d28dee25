"""bench.profile on the CPU: the trace, the tables, the ncu command; its reading of CUDA events from made-up ones."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import tyro

from bench import profile
from fastvae import functional as F

SMALL = profile.Arguments(hidden=(16,), latent_dim=4, shape=(4, 8), batch_size=8, device="cpu", warmup=1, steps=2)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_profile_names_the_stages_and_writes_a_trace(likelihood, tmp_path):
    gather_batch, backward = F.gather_batch, torch.autograd.backward
    arguments = replace(SMALL, likelihood=likelihood, out=tmp_path / "trace.json", top=200)
    report = profile.run(arguments)
    trace = {event.get("name") for event in json.loads(arguments.out.read_text())["traceEvents"]}
    for stage in profile.STAGES:
        assert stage in trace
        assert f"| {stage}" in report
    assert "aten::addmm" in report or "fastvae::linear_fwd" in report
    # the trainer's own step: the paper's model goes without autograd
    assert ("aten::addmm" in report and "Backward" in report) == (likelihood == "gaussian")
    # what was patched is as before
    assert F.gather_batch is gather_batch
    assert torch.autograd.backward is backward


def test_the_functions_of_the_kernel_package_get_their_speed(tmp_path):
    pytest.importorskip("fastvae_cpu_kernels")
    arguments = replace(SMALL, out=tmp_path / "trace.json", top=200)
    report = profile.run(arguments)
    (line,) = [line for line in report.splitlines() if "fastvae::reparameterize_kl_fwd" in line]
    calls, microseconds, _, speed = (cell.strip() for cell in line.split("|")[2:6])
    # mu and logvar [8, 4], z [8, 4], kl [8] in float32, and the seed
    assert calls == "1.0"
    assert float(speed) == pytest.approx((3 * 8 * 4 * 4 + 8 * 4 + 8) / float(microseconds) / 1e3, abs=0.06)


def test_bytes_count_each_tensor_once_and_expanded_elements_once():
    expanded = torch.ones(3, 1).expand(3, 5)
    assert profile._bytes((torch.ones(4), [expanded, None, 7])) == 4 * 4 + 3 * 4


def test_on_cuda_the_table_lists_kernels_and_not_the_operators_that_launch_them():
    def event(key, device, microseconds, annotation=False):
        return SimpleNamespace(
            key=key,
            count=4,
            device_type=SimpleNamespace(name=device),
            is_user_annotation=annotation,
            self_device_time_total=microseconds,
        )

    events = [
        event("aten::mm", "CPU", 30.0),
        event("sgemm", "CUDA", 30.0),
        event("forward", "CUDA", 40.0, annotation=True),
        event("_bernoulli_nll_kernel", "CUDA", 10.0),
    ]
    moved = defaultdict(int, {"_bernoulli_nll_kernel": 20_000_000})
    _, _, *lines = profile.kernel_table(events, moved, steps=2, top=9, cuda=True).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [["sgemm", "2.0", "15.0", "75.0%", ""], ["_bernoulli_nll_kernel", "2.0", "5.0", "25.0%", "2,000.0"]]


def test_the_ncu_command_runs_this_setting_again():
    pytest.importorskip("fastvae_kernels")
    arguments = replace(SMALL, kernel="_bernoulli_nll_kernel")
    command = shlex.split(profile.ncu_command(arguments))
    assert command[0] == "ncu"
    assert command[command.index("--kernel-name") + 1] == "_bernoulli_nll_kernel"
    again = tyro.cli(profile.Arguments, args=command[command.index("bench.profile") + 1 :])
    assert again == replace(SMALL, plain=True)
    assert "2 steps on cpu" in profile.run(again)


def test_an_unknown_kernel_is_refused_with_the_names_of_all():
    pytest.importorskip("fastvae_kernels")
    with pytest.raises(ValueError, match=r"no kernel 'none', expected one of .*_bernoulli_nll_kernel, "):
        profile.ncu_command(replace(SMALL, kernel="none"))

"""Two hosts: one is lost, the other goes on alone; it returns, and both go on. In network namespaces where root is.

Elsewhere the two `torchrun` nodes share the loopback address.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.runs import ARGUMENTS, final, kill, start, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="two torchrun nodes on Linux"),
]


class Host:
    """Where a node of `torchrun` is started: a network namespace, or this machine."""

    def __init__(self, number: int, namespace: str | None) -> None:
        self.number = number
        self.prefix = ["ip", "netns", "exec", namespace] if namespace else []
        self.address = f"10.231.7.{number + 1}" if namespace else "127.0.0.1"
        self.interface = "veth" if namespace else "lo"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    names = [f"fastvae-{secrets.token_hex(3)}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        yield Host(0, None), Host(1, None)
        return
    try:
        ip("-n", names[0], "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.231.7.{number + 1}/24", "dev", "veth")
            for device in ("lo", "veth"):
                ip("-n", name, "link", "set", device, "up")
        yield Host(0, names[0]), Host(1, names[1])
    finally:
        for name in names:
            ip("netns", "delete", name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_host_is_lost_and_returns(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    assert shutil.which("ip") is None or os.geteuid() != 0 or hosts[0].prefix, "namespaces were expected to work here"
    out, port, job = tmp_path / "run", free_port(), secrets.token_hex(4)
    logs = [tmp_path / "host0.log", tmp_path / "host1.log"]
    settings = ["--epochs", "1000000", "--log-every", "50", "--eval-every", "1000", "--checkpoint-every", "20"]

    def node(host: Host) -> subprocess.Popen[bytes]:
        # host 0 is where the nodes meet; what is left of them meets again after two seconds
        torchrun = (
            f"--nnodes=1:2 --nproc-per-node=1 --max-restarts=5 --rdzv-backend=c10d --rdzv-id={job} "
            f"--rdzv-endpoint={hosts[0].address}:{port} --local-addr={host.address} "
            f"--rdzv-conf=is_host={int(host.number == 0)},last_call_timeout=2"
        )
        return start(
            "train",
            *ARGUMENTS,
            *settings,
            "--out",
            str(out),
            torchrun=torchrun,
            log=logs[host.number],
            prefix=host.prefix,
            GLOO_SOCKET_IFNAME=host.interface,
            # otherwise torch does not tell a node that comes later where the workers meet
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def said() -> list[str]:
        """The first lines of every start, by whichever host had rank 0."""
        lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
        return [line for line in lines if line.startswith(f"{out}: ")]

    def steps() -> int:
        rows = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        return 50 * len(rows)

    def trained_on() -> None:
        reached = steps()
        wait_for(lambda: steps() >= reached + 100)

    nodes = [node(host) for host in hosts]
    try:
        wait_for(lambda: any("2 ranks" in line for line in said()))
        trained_on()
        kill(nodes[1])
        wait_for(lambda: any("resumed" in line and "ranks" not in line for line in said()))
        trained_on()
        nodes[1] = node(hosts[1])
        wait_for(lambda: any("resumed" in line and "2 ranks" in line for line in said()))
        trained_on()
        for process in nodes:
            process.send_signal(signal.SIGTERM)
        for process in nodes:
            process.wait()
    finally:
        for process in nodes:
            if process.poll() is None:
                kill(process)
    print(*said(), sep="\n")

    step, alone = int(final(out)["step"]), tmp_path / "alone"
    assert start("train", *ARGUMENTS, *settings, "--max-steps", str(step), "--out", str(alone)).wait() == 0
    one, two = final(alone), final(out)
    rows = [{row["step"]: row["negative_elbo"] for row in run["rows"] if row["split"] == "train"} for run in (one, two)]
    # the end of a run is logged, whatever its number; that of a stopped one is not
    both = [number for number in rows[0] if number % 50 == 0]
    difference = max(abs(rows[1][number] / rows[0][number] - 1) for number in both)
    print(
        f"in {step} steps the logged bounds differ from those of one process by {difference:.1g} of their value at most"
    )
    assert difference < 1e-3
    logged = [row["step"] for row in two["rows"]]
    assert logged == sorted(logged)

"""What a program asks of its process: memory that was freed is used again, and nobody waits awake for long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from fastvae.process import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

# 48 MB: glibc never keeps more than 32 MB by itself. At first aligned blocks do not fit where others were
for _ in range(20):
    torch.ones(12_000_000)
before = faults()
for _ in range(10):
    torch.ones(12_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)

    # a page is 4 kB, or 2 MB where the system hands out huge ones
    assert faults("let go") > 10 * 20
    assert faults("keep") < 50


def test_openmp_is_told_before_torch_is_there() -> None:
    program = (
        "import sys, fastvae.__main__, os; assert 'torch' not in sys.modules; "
        "fastvae.__main__.prepare_process(); print(os.environ.get('GOMP_SPINCOUNT'))"
    )

    def spins(**settings: str) -> str:
        own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        env = own | settings | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
        ).stdout

    assert spins() == "10000\n"
    # who knows better is obeyed
    assert spins(GOMP_SPINCOUNT="7") == "7\n"
    assert spins(OMP_WAIT_POLICY="active") == "None\n"


def test_what_the_package_exports() -> None:
    import fastvae

    for name in fastvae.__all__:
        assert getattr(fastvae, name) is not None
    assert callable(fastvae.VAE)
    with pytest.raises(AttributeError, match="has no attribute 'vae'"):
        _ = fastvae.vae


def test_the_program_collects_garbage_less_often() -> None:
    script = "import gc, fastvae.__main__; fastvae.__main__.prepare_process(); print(gc.get_threshold()[0])"
    assert int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout) == 10_000

"""The kernels as a Hugging Face kernel: a valid source, and a no-arch variant built by hand that loads offline."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.op_checks import DEVICE, load_backend

SOURCE = Path(__file__).parents[1] / "kernels"
PACKAGE = SOURCE / "torch-ext" / "fastvae_kernels"

kernels = pytest.importorskip("kernels")


def test_build_toml_is_valid() -> None:
    rust = pytest.importorskip("kernels._rust", reason="older versions of kernels do not read build.toml")
    rust.Build.open(SOURCE)
    name = re.search(r'^name = "(.+)"$', (SOURCE / "build.toml").read_text(), re.MULTILINE)
    assert name is not None
    assert rust.KernelName(name[1]).python_name == PACKAGE.name
    assert (SOURCE / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\n")


def test_imports_are_those_a_hub_kernel_may_have() -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [str(node.module)]
            else:
                continue
            assert {module.split(".")[0] for module in modules} <= allowed, path.name


def test_variant_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that lives outside the module path, beside the installed package, with the same results."""
    installed = load_backend("triton")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    variant = tmp_path / "build" / "torch-cuda"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": "_fastvae_kernels_cuda_test",
        "name": "fastvae-kernels",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))

    # the variant's own folder, as a machine without a GPU finds no variant for its backend
    loaded = kernels.get_local_kernel(variant)
    assert Path(loaded.__file__).parent == variant
    assert sorted(loaded.__all__) == sorted(installed.__all__)
    mu, logvar = torch.randn(2, 5, 20, device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    for copy, original in zip(
        loaded.reparameterize_kl_fwd(mu, logvar, seed, 0, 0, True),
        installed.reparameterize_kl_fwd(mu, logvar, seed, 0, 0, True),
        strict=True,
    ):
        assert torch.equal(copy, original)

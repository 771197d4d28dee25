"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, `.` for a relative import."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] if name != "." else "." for name in names} - STDLIB


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels/torch-ext/fastvae_kernels", {"torch", "triton", "."}),
        ("kernels/cpu/fastvae_cpu_kernels", {"torch", "llvmlite", "numba", "numpy", "."}),
    ],
)
def test_kernel_packages_import_only_their_own(folder: str, allowed: set[str]) -> None:
    for file in (ROOT / folder).glob("*.py"):
        got = roots(imports(file))
        assert got <= allowed, f"{file.name} imports {got - allowed}"


def test_the_reference_imports_torch_alone() -> None:
    assert roots(imports(ROOT / "fastvae" / "reference.py")) == {"torch"}


def test_only_functional_knows_the_kernel_packages() -> None:
    for file in (ROOT / "fastvae").glob("*.py"):
        mentions = "fastvae_kernels" in file.read_text() or "fastvae_cpu_kernels" in file.read_text()
        assert mentions == (file.name == "functional.py"), file.name


def test_nothing_imports_bench_or_tests() -> None:
    for file in [*(ROOT / "fastvae").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not roots(imports(file)) & {"bench", "tests"}, file.name


def test_the_layers_of_the_library() -> None:
    above = {"fastvae.train", "fastvae.cli", "fastvae.commands", "fastvae.evaluate", "fastvae.figures"}
    for name in ("models", "nn", "distributions", "functional", "step", "data", "checkpoint", "config"):
        assert not imports(ROOT / "fastvae" / f"{name}.py") & above, name


def test_there_is_no_package_called_kernels() -> None:
    # it would shadow Hugging Face's package of that name, which transformers imports
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_touches_no_kernel_package_and_no_driver() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastvae, fastvae.functional; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not new & {'fastvae_kernels', 'fastvae_cpu_kernels', 'numba', 'matplotlib', 'sklearn', "
        "'huggingface_hub', 'pooch', 'tyro', 'rich'}, new; "
        "assert not torch.cuda.is_initialized()"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)

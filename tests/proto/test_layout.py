"""The house rules that no linter knows: what is packaged, what stays free of torch, and how long things may
be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGES = {"benchmarks", "build", "deploy", "dist", "docs", "tests"}

TORCH_FREE = (
    "checkpoints", "cluster", "decode_workers", "engine", "kv_transfer", "prefill_workers", "proto", "router",
)  # fmt: skip
"""Folders whose modules load no torch, but for NEEDS_TORCH."""
NEEDS_TORCH = {
    *(
        f"engine.{name}"
        for name in (
            *("engine", "generate", "kv_pool", "llama", "model_runner", "rank_steps", "ranks", "sampler"),
            *("shard", "step_rows", "weights"),
        )
    ),
    "decode_workers.worker",
    "prefill_workers.worker",
}
"""The real engine, and where a role is composed with it."""

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120

# Imports the modules named by its arguments in turn and stops at the first that brings torch or triton along.
PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {"torch", "triton"} & set(sys.modules)
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(sorted(loaded))}")
"""


def package_folders() -> list[Path]:
    """Every folder below the root that is a Python package, the root's own left out."""
    return sorted(
        init.parent.relative_to(ROOT)
        for init in ROOT.rglob("__init__.py")
        if init.parent != ROOT
        and not any(part.startswith(".") for part in init.relative_to(ROOT).parts)
        and init.relative_to(ROOT).parts[0] not in NOT_PACKAGES
    )


def own_sources() -> list[Path]:
    """Modules that people wrote: the package's, the benchmarks' and the tests'."""
    folders = {path.parts[0] for path in package_folders()} | {"benchmarks", "tests"}
    sources = [path for folder in sorted(folders) for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in sources if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def torch_free_modules(folder: str) -> list[str]:
    """Dotted names below diphase, without the packages themselves."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    return [name for name in names if name not in NEEDS_TORCH]


def probe(names: list[str]) -> None:
    command = [sys.executable, "-P", "-c", PROBE, *(f"diphase.{name}" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.strip()


def test_every_package_on_disk_is_packaged_and_nothing_else() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = ["diphase", *(".".join(("diphase", *path.parts)) for path in package_folders())]
    assert sorted(declared) == sorted(on_disk)


def test_every_folder_with_modules_is_a_package() -> None:
    packages = {ROOT / path for path in package_folders()}
    tops = {ROOT / path.parts[0] for path in package_folders()}
    folders = {path.parent for top in tops for path in top.rglob("*.py")}
    assert folders <= packages


def test_inits_of_packages_are_empty() -> None:
    filled = [str(path) for path in package_folders() if (ROOT / path / "__init__.py").read_text().strip()]
    assert filled == []


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_modules_load_no_torch(folder: str) -> None:
    names = torch_free_modules(folder)
    assert names
    probe(names)


def test_every_exception_is_a_module() -> None:
    assert all((ROOT / (name.replace(".", "/") + ".py")).is_file() for name in NEEDS_TORCH)


def test_the_probe_notices_torch(tmp_path: Path) -> None:
    (tmp_path / "guilty.py").write_text(
        "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n"
    )
    command = [sys.executable, "-c", PROBE, "json", "guilty"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "importing guilty loads torch" in done.stderr


@pytest.mark.parametrize("path", own_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= MAX_MODULE_LINES, f"{lines} lines of at most {MAX_MODULE_LINES}: split it"
    limit = MAX_KERNEL_LINES if path.relative_to(ROOT).parts[0] == "kernels" else MAX_FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = function_lines(node)
            assert length <= limit, f"{node.name} (line {node.lineno}) has {length} lines of at most {limit}"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last statement; a docstring costs nothing."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total

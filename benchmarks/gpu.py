"""What a machine with GPUs does: every section of this benchmark first checks that results are right, then
measures.

    .venv/bin/python -P benchmarks/gpu.py [--sections cuda_ipc,nccl] [--output docs/results/gpu.json]

A section is a function without arguments in a module of this folder that returns what goes into JSON. Prints
JSON with the versions of everything below it. Exits 1 if a section failed. Without a GPU it says so, checks
what can be checked, and exits 0. Needs no more than the extra `cuda` beside torch and numpy, and nothing of a
cluster.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

SECTIONS: Mapping[str, str] = {
    "cuda_ipc": "diphase.benchmarks.gpu_transports:cuda_ipc",
    "nccl": "diphase.benchmarks.gpu_transports:nccl",
    "kernels": "diphase.benchmarks.gpu_kernels:section",
}
"""Name to "module:function"."""
PACKAGES = ("torch", "triton", "cupy-cuda13x", "nvidia-nccl-cu13", "numpy")
PATIENCE_S = 60.0


def load(path: str) -> Callable[[], dict[str, Any]]:
    module, _, name = path.partition(":")
    function: Callable[[], dict[str, Any]] = getattr(importlib.import_module(module), name)
    return function


def head() -> dict[str, Any]:
    """What the numbers are of."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    command = shlex.join([".venv/bin/python", "-P", "benchmarks/gpu.py", *sys.argv[1:]])
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "devices": devices,
    }


def checks_without_gpu() -> dict[str, str]:
    """What is known of the sections all the same."""
    found = {}
    for name, path in SECTIONS.items():
        try:
            load(path)
            found[name] = "can be loaded; not run, it needs a GPU"
        except ImportError as error:
            found[name] = f"cannot be loaded: {error}"
    found["nccl unique id"] = unique_id_of_an_owner()
    return found


def unique_id_of_an_owner() -> str:
    """Whether the process that owns a communicator starts, finds NCCL and names one."""
    from diphase.kv_transfer.transports.nccl import COMMUNICATOR
    from diphase.kv_transfer.transports.nccl_process import OwnerProcess
    from diphase.proto.errors import DiphaseError

    owner = OwnerProcess(COMMUNICATOR)
    try:
        owner.open(1, [])
        while not (told := owner.read()):
            if not select.select([owner.connection.sock], [], [], PATIENCE_S)[0]:
                return "the owner process says nothing"
        return f"made: {type(told[0]).__name__}"
    except DiphaseError as error:
        return f"not made: {error.message}"
    finally:
        owner.kill()
        owner.wait()
        owner.release()


def run(names: list[str]) -> tuple[dict[str, Any], bool]:
    """Results by section, and whether all went well."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = load(SECTIONS[name])()
        except Exception as error:  # the other sections can still be run
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    return results, not any("failed" in result for result in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of " + ", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    names = args.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"there are no sections {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if torch.cuda.is_available():
        sections, well = run(names)
        result = {**head(), "sections": sections}
    else:
        print("no CUDA device here: nothing is measured", file=sys.stderr)
        well, result = True, {**head(), "without_gpu": checks_without_gpu()}
    text = json.dumps(result, indent=1)
    print(text)
    if args.output is not None and torch.cuda.is_available():
        args.output.write_text(text + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

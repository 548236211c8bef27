"""The generated stubs are those of the .proto files beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc_tools
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.name for path in (ROOT / "proto").glob("*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh stubs, made as `make proto` makes them."""
    out = tmp_path_factory.mktemp("stubs")
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", "-Idiphase/proto=proto", f"-I{builtin}"]
    command += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command += [f"diphase/proto/{name}" for name in PROTOS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return out / "diphase" / "proto"


@pytest.mark.parametrize("proto", PROTOS)
def test_stubs_are_up_to_date(generated: Path, proto: str) -> None:
    for suffix in SUFFIXES:
        name = proto.removesuffix(".proto") + suffix
        kept = ROOT / "proto" / name
        assert kept.is_file(), f"proto/{name} is missing; run `make proto`"
        assert kept.read_text() == (generated / name).read_text(), f"proto/{name} is old; run `make proto`"


def test_no_stub_is_left_of_a_file_that_is_gone() -> None:
    stems = {path.name.removesuffix(s) for s in SUFFIXES for path in (ROOT / "proto").glob(f"*{s}")}
    assert stems == {name.removesuffix(".proto") for name in PROTOS}

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from diphase.kernels.registry import Kernels, KvCopies, kernels_for, kv_copies_for
from diphase.proto.errors import KernelError


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_every_operation_of_a_model_has_an_implementation(device: str) -> None:
    kernels = kernels_for(device)
    assert all(callable(getattr(kernels, field.name)) for field in fields(Kernels))


@pytest.mark.parametrize("device", ["cpu", "reference", "cuda"])
def test_every_operation_of_a_hand_off_has_an_implementation(device: str) -> None:
    copies = kv_copies_for(device)
    assert all(callable(getattr(copies, field.name)) for field in fields(KvCopies))


def test_an_unknown_device_is_named_with_those_that_are_known() -> None:
    with pytest.raises(KernelError, match=r"'abacus'.*there are reference, cpu$"):
        kernels_for("abacus")
    with pytest.raises(KernelError, match=r"'abacus'.*there are reference, cpu, cuda$"):
        kv_copies_for("abacus")


def test_without_triton_only_the_kernels_for_a_gpu_are_missing() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # as where it is not installed
        "from diphase.kernels.registry import kernels_for, kv_copies_for\n"
        "from diphase.proto.errors import KernelError\n"
        "kernels_for('cpu'), kv_copies_for('cpu')\n"
        "try:\n"
        "    kv_copies_for('cuda')\n"
        "except KernelError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.endswith("need triton, which is not installed; pip install 'diphase[cuda]'\n")

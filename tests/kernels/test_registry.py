from __future__ import annotations

import pytest
from diphase.kernels.registry import kernels_for
from diphase.proto.errors import KernelError


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_every_operation_has_an_implementation(device: str) -> None:
    kernels = kernels_for(device)
    for name in ("linear", "rms_norm", "rope", "kv_write", "paged_attention"):
        assert callable(getattr(kernels, name))


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(KernelError, match="'abacus'"):
        kernels_for("abacus")

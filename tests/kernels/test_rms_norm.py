from __future__ import annotations

import pytest
import torch
from diphase.kernels.rms_norm import RmsNorm, rms_norm_cpu, rms_norm_reference
from diphase.proto.errors import KernelError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 32, 33, 200])
def test_cpu_path_equals_the_reference(dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = (torch.randn(num_tokens, 576, generator=generator) * 3).to(dtype)
    weight = torch.rand(576, generator=generator).to(dtype)
    kept, expected, result = x.clone(), torch.empty_like(x), torch.empty_like(x)
    rms_norm_reference(expected, x, weight, 1e-5)
    rms_norm_cpu(result, x, weight, 1e-5)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert torch.equal(x, kept)


def test_rows_have_the_same_bits_in_any_number() -> None:
    x = torch.randn(300, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(576, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = torch.empty_like(x)
    rms_norm_cpu(whole, x, weight, 1e-5)
    for num_tokens in (1, 2, 17, 32, 33, 100):
        part = torch.empty_like(x[:num_tokens])
        rms_norm_cpu(part, x[:num_tokens], weight, 1e-5)
        assert torch.equal(part, whole[:num_tokens])


@pytest.mark.parametrize("norm", [rms_norm_cpu, rms_norm_reference])
def test_wrong_shapes_and_dtypes_are_refused(norm: RmsNorm) -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    for out, rows, scale in (
        (x[:1], x, weight),
        (x, x, weight[:7]),
        (x, x, weight.bfloat16()),
        (x.bfloat16(), x, weight),
    ):
        with pytest.raises(KernelError):
            norm(out, rows, scale, 1e-5)

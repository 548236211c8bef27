from __future__ import annotations

import pytest
import torch
from diphase.kernels import linear_packed
from diphase.kernels.linear import DenseLinear, Epilogue, Linear, apply_epilogue
from diphase.kernels.linear_int8 import Int8Linear, quantise
from diphase.kernels.linear_packed import PackedLinear, can_pack
from diphase.kernels.registry import kernels_for
from diphase.proto.errors import KernelError

packs = pytest.mark.skipif(
    not can_pack(torch.zeros(16, 16, dtype=torch.bfloat16)), reason="oneDNN has no bf16 product here"
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epilogue: Epilogue, other: torch.Tensor
) -> torch.Tensor:
    """In fp64."""
    y = x.double() @ weight.double().T + bias.double()
    return apply_epilogue(y, epilogue, other.double())


@packs
@pytest.mark.parametrize("epilogue", list(Epilogue))
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 70])
def test_packed_equals_the_product_in_fp64(epilogue: Epilogue, num_tokens: int) -> None:
    x, weight, bias = numbers(num_tokens, 96), numbers(80, 96, seed=1), numbers(80, seed=2)
    other = numbers(num_tokens, 80, seed=3)
    result = PackedLinear(weight, bias)(x, epilogue, other)
    torch.testing.assert_close(
        result.double(), expected(x, weight, bias, epilogue, other), atol=0.05, rtol=0.01
    )


@pytest.mark.parametrize("epilogue", list(Epilogue))
def test_dense_equals_the_product_in_fp64(epilogue: Epilogue) -> None:
    x, weight, bias = numbers(5, 96).float(), numbers(80, 96, seed=1).float(), numbers(80, seed=2).float()
    other = numbers(5, 80, seed=3).float()
    result = DenseLinear(weight, bias)(x, epilogue, other)
    torch.testing.assert_close(
        result.double(), expected(x, weight, bias, epilogue, other), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("num_tokens", [1, 12, 13, 64])
def test_int8_equals_the_product_with_its_rounded_weights(num_tokens: int) -> None:
    x, weight, bias = numbers(num_tokens, 96), numbers(80, 96, seed=1), numbers(80, seed=2)
    other = numbers(num_tokens, 80, seed=3)
    values, scales = quantise(weight)
    rounded = values.double() * scales.double().unsqueeze(1)
    for epilogue in Epilogue:
        result = Int8Linear(weight, bias)(x, epilogue, other)
        wanted = expected(x, rounded.to(torch.float64), bias, epilogue, other)
        torch.testing.assert_close(result.double(), wanted, atol=0.15, rtol=0.02)


def test_int8_weights_are_within_half_a_step() -> None:
    weight = numbers(80, 96)
    values, scales = quantise(weight)
    assert values.dtype == torch.int8
    error = (values.float() * scales.float().unsqueeze(1) - weight.float()).abs()
    assert bool((error <= 0.51 * scales.float().unsqueeze(1)).all())
    zeros, _ = quantise(torch.zeros(4, 8))
    assert not zeros.any()


@packs
def test_rows_of_a_small_model_have_the_same_bits_at_any_number() -> None:
    """What makes the tiny dummy model's output independent of batching; its shapes."""
    for out_features, in_features in ((256, 128), (128, 128), (256, 128), (128, 256), (512, 128)):
        layer, x = PackedLinear(numbers(out_features, in_features)), numbers(600, in_features, seed=1)
        whole = layer(x)
        for num_tokens in (1, 2, 8, 16, 24, 32, 48, 64, 160, 352, 512):
            assert torch.equal(layer(x[:num_tokens]), whole[:num_tokens])


@packs
@pytest.mark.parametrize("prompts", [False, True])
def test_rows_of_the_default_model_have_the_same_bits_among_others(prompts: bool) -> None:
    """Its shapes; on each side of the bounds that keep decode steps and prompts apart."""
    for out_features, in_features in ((960, 576), (576, 576), (1536, 576), (576, 1536)):
        layer, x = PackedLinear(numbers(out_features, in_features)), numbers(512, in_features, seed=1)
        most = 512 if prompts else 32
        whole = layer(x[:most])
        for num_tokens in (1, 2, 3, 5, 9, 17, 32, 33, 100, 257):
            size = layer.padded_rows(num_tokens, prompts)
            if size <= most:
                for begin in range(0, most - size + 1, max(1, most // 16)):
                    assert torch.equal(layer(x[begin : begin + size]), whole[begin : begin + size])


@packs
@pytest.mark.parametrize("epilogue", list(Epilogue))
def test_many_rows_are_the_pieces_put_together(epilogue: Epilogue) -> None:
    layer, x, other = PackedLinear(numbers(80, 96)), numbers(1100, 96), numbers(1100, 80, seed=3)
    pieces = [layer(x[i : i + 512], epilogue, other[i : i + 512]) for i in range(0, 1100, 512)]
    assert torch.equal(layer(x, epilogue, other), torch.cat(pieces))


@pytest.mark.parametrize("prompts", [False, True])
def test_padded_rows_hold_the_tokens_and_are_few(prompts: bool) -> None:
    sizes = [linear_packed.padded_rows(n, prompts) for n in range(1, 2049)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 60
    assert all(size <= 32 for size in sizes[:32]) != prompts
    assert all(size % 512 == 0 or size % 512 >= 48 for size in sizes[32:])


def test_the_registry_takes_the_path_that_the_weight_asks_for() -> None:
    make = kernels_for("cpu").linear
    weight = numbers(32, 32)
    assert isinstance(make(weight, quantised=True), Int8Linear)
    assert isinstance(make(weight.float()), DenseLinear)
    assert isinstance(make(weight), PackedLinear if can_pack(weight) else DenseLinear)


def layers() -> list[Linear]:
    weight = numbers(32, 64)
    make = kernels_for("cpu").linear
    return [make(weight), make(weight, quantised=True), DenseLinear(weight)]


@pytest.mark.parametrize("layer", layers())
def test_wrong_shapes_and_dtypes_are_refused(layer: Linear) -> None:
    for bad in (numbers(3, 63), numbers(3, 64).float(), numbers(64)):
        with pytest.raises(KernelError, match="linear takes"):
            layer(bad)
    for epilogue in (Epilogue.MUL, Epilogue.ADD):
        with pytest.raises(KernelError, match="needs `other`"):
            layer(numbers(3, 64), epilogue)

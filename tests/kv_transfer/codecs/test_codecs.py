"""What every codec owes: values close to those that went in, bounded payloads, and a refusal by name of
bytes that are none of its own."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from diphase.kv_transfer.codecs.codec import CODECS, RAW, Codec, KvSpec, load_codec, load_codecs
from diphase.kv_transfer.codecs.codec_floats import Bits, as_bits, store_floats, to_floats
from diphase.kv_transfer.codecs.codec_fp8 import Fp8Codec
from diphase.proto.errors import ConfigError, TransferError
from diphase.proto.kv_layout import ITEM_BYTES, KvLayout
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

LOSSY = [name for name in CODECS if name != RAW]
WORST = {"fp8": 0.04, "int8": 0.007, "cachegen-3": 0.07, "cachegen-2": 0.13, "cachegen-1": 0.25}
"""Largest error of a drawn value as a share of its head's largest magnitude."""


def make_spec(
    dtype: str = "bf16",
    *,
    num_blocks: int = 3,
    unused: int = 0,
    first_layer: int = 0,
    num_layers: int = 6,
    num_kv_heads: int = 2,
    block_size: int = 8,
    head_dim: int = 16,
) -> KvSpec:
    layout = KvLayout(
        model="m",
        num_layers=6,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    return KvSpec(
        layout=layout,
        num_blocks=num_blocks,
        num_tokens=num_blocks * block_size - unused,
        first_layer=first_layer,
        num_layers=num_layers,
    )


def drawn_kv(spec: KvSpec, seed: int = 0) -> memoryview:
    """Values whose spread differs by head and whose mean differs by channel."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(spec.shape, np.float32)
    values += 2 * rng.standard_normal((spec.num_layers, 2, spec.shape[3], 1, spec.shape[5]), np.float32)
    values *= np.exp(rng.standard_normal((spec.num_layers, 2, spec.shape[3], 1, 1), np.float32))
    kv = memoryview(bytearray(spec.size_bytes))
    store_floats(values, spec.layout.dtype, as_bits(kv, spec.layout.dtype).reshape(spec.shape))
    return kv


def encoded(codec: Codec, kv: memoryview, spec: KvSpec) -> memoryview:
    out = memoryview(bytearray(codec.max_bytes(spec)))
    return out[: codec.encode(kv, spec, out)]


def decoded(codec: Codec, payload: memoryview, spec: KvSpec) -> memoryview:
    out = memoryview(bytearray(b"\xa5" * spec.size_bytes))
    codec.decode(payload, spec, out)
    return out


def by_tokens(kv: memoryview, spec: KvSpec) -> NDArray[np.float32]:
    """fp32 of the used slots, [num_tokens, num_layers, 2, num_kv_heads, head_dim]."""
    values = to_floats(as_bits(kv, spec.layout.dtype).reshape(spec.shape), spec.layout.dtype)
    tokens = values.transpose(0, 4, 1, 2, 3, 5)
    return tokens.reshape(-1, *tokens.shape[2:])[: spec.num_tokens]


def worst_error(kv: memoryview, back: memoryview, spec: KvSpec) -> float:
    """Largest error of a value as a share of the largest magnitude of its head."""
    values = by_tokens(kv, spec)
    error = np.abs(by_tokens(back, spec) - values).max(axis=(0, -1))
    return float((error / np.abs(values).max(axis=(0, -1))).max())


SPECS = [
    make_spec(),
    make_spec("fp16", unused=3),
    make_spec("fp32", num_blocks=1, unused=7),
    make_spec(first_layer=4, num_layers=2),
    make_spec(num_blocks=30, num_layers=1, num_kv_heads=1),
    make_spec(num_blocks=2, block_size=64, head_dim=6, unused=63),
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("name", LOSSY)
def test_values_come_back_close_and_the_bound_on_the_payload_holds(name: str, spec: KvSpec) -> None:
    codec, kv = load_codec(name), drawn_kv(spec)
    payload = encoded(codec, kv, spec)
    assert len(payload) <= codec.max_bytes(spec)
    assert worst_error(kv, decoded(codec, payload, spec), spec) <= WORST[name]
    assert not codec.lossless


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_raw_gives_back_every_byte(spec: KvSpec) -> None:
    codec, kv = load_codec(RAW), drawn_kv(spec)
    assert codec.lossless
    assert decoded(codec, encoded(codec, kv, spec), spec) == kv
    with pytest.raises(TransferError, match="length"):
        decoded(codec, kv[:-1], spec)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_named_as_it_is_registered(name: str) -> None:
    assert load_codec(name).name == name


def test_unknown_names_are_refused_and_raw_is_always_there() -> None:
    assert list(load_codecs(["int8"])) == [RAW, "int8"]
    for load in (load_codec, lambda name: load_codecs([name])):
        with pytest.raises(ConfigError, match="'zip' is unknown; use one of raw"):
            load("zip")


@pytest.mark.parametrize("name", LOSSY)
def test_coding_depends_on_nothing_but_the_kv(name: str) -> None:
    spec = make_spec(unused=2)
    codec, kv = load_codec(name), drawn_kv(spec)
    assert encoded(codec, kv, spec) == encoded(load_codec(name), kv, spec)


@pytest.mark.parametrize("name", CODECS)
def test_buffers_of_the_wrong_size_are_refused(name: str) -> None:
    spec = make_spec()
    codec, kv = load_codec(name), drawn_kv(spec)
    with pytest.raises(TransferError, match=r"kv has \d+ bytes"):
        encoded(codec, kv[2:], spec)
    with pytest.raises(TransferError, match=r"out has \d+"):
        codec.encode(kv, spec, memoryview(bytearray(codec.max_bytes(spec) - 1)))
    with pytest.raises(TransferError, match=r"out has \d+"):
        codec.decode(encoded(codec, kv, spec), spec, kv[2:])


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    ("other", "field"),
    [
        (make_spec("fp16"), "dtype"),
        (make_spec(num_kv_heads=4, head_dim=8), "num_kv_heads"),
        (make_spec(head_dim=8), "head_dim"),
        (make_spec(first_layer=1, num_layers=5), "first_layer"),
        (make_spec(num_layers=5), "num_layers"),
        (make_spec(num_blocks=6, block_size=4), "block_size"),
        (make_spec(num_blocks=4), "num_blocks"),
        (make_spec(unused=1), "num_tokens"),
    ],
)
def test_a_payload_of_another_spec_is_refused_by_its_field(name: str, other: KvSpec, field: str) -> None:
    codec, spec = load_codec(name), make_spec()
    payload = encoded(codec, drawn_kv(other), other)
    with pytest.raises(TransferError, match=f"payload's {field} is"):
        decoded(codec, payload, spec)


def test_a_payload_of_another_codec_is_refused() -> None:
    spec = make_spec()
    payload = encoded(load_codec("int8"), drawn_kv(spec), spec)
    for name in ("fp8", "cachegen-2"):
        with pytest.raises(TransferError, match="codec is 1"):
            decoded(load_codec(name), payload, spec)
    payload[0] ^= 1
    with pytest.raises(TransferError, match="magic"):
        decoded(load_codec("int8"), payload, spec)


def test_cachegen_payloads_of_any_level_are_read_by_every_level() -> None:
    spec = make_spec()
    payload = encoded(load_codec("cachegen-1"), drawn_kv(spec), spec)
    assert decoded(load_codec("cachegen-3"), payload, spec) == decoded(
        load_codec("cachegen-1"), payload, spec
    )


FUZZED = make_spec(num_blocks=2, unused=3, num_layers=2)
PAYLOADS = {name: bytes(encoded(load_codec(name), drawn_kv(FUZZED), FUZZED)) for name in LOSSY}


@pytest.mark.parametrize("name", LOSSY)
def test_every_truncation_and_every_appendix_is_refused(name: str) -> None:
    codec, payload = load_codec(name), PAYLOADS[name]
    cuts = {*range(0, 160), *range(160, len(payload), 37), len(payload) - 1}
    for cut in sorted(cuts):
        with pytest.raises(TransferError):
            decoded(codec, memoryview(payload[:cut]), FUZZED)
    with pytest.raises(TransferError):
        decoded(codec, memoryview(payload + b"\0"), FUZZED)


@pytest.mark.parametrize("name", ["fp8", "int8", "cachegen-2"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_payloads_are_refused_or_decoded_within_bounds(name: str, data: st.DataObject) -> None:
    payload = bytearray(PAYLOADS[name])
    for _ in range(data.draw(st.integers(1, 6))):
        begin = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, 120))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        payload[begin : begin + len(patch)] = patch
    guarded = bytearray(b"\x5a" * (FUZZED.size_bytes + 128))
    out = memoryview(guarded)[64:-64]
    with suppress(TransferError):
        load_codec(name).decode(memoryview(payload), FUZZED, out)
    assert guarded[:64] == guarded[-64:] == b"\x5a" * 64


@pytest.mark.parametrize("name", ["fp8", "int8", "cachegen-2"])
@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=400))
def test_junk_behind_a_good_head_is_refused(name: str, junk: bytes) -> None:
    payload = PAYLOADS[name][:28] + junk
    with pytest.raises(TransferError, match="payload"):
        decoded(load_codec(name), memoryview(payload), FUZZED)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_broken_values_stay_broken_and_spoil_no_others(name: str, dtype: str) -> None:
    spec = make_spec(dtype)
    codec, kv = load_codec(name), drawn_kv(spec)
    values = to_floats(as_bits(kv, dtype).reshape(spec.shape), dtype).copy()
    values[1, 2, 0, 1, 3, 4] = np.nan
    values[2, 3, 1, 0, 5, 6] = np.inf
    values[2, 3, 1, 0, 6, 6] = -np.inf
    store_floats(values, dtype, as_bits(kv, dtype).reshape(spec.shape))
    back = decoded(codec, encoded(codec, kv, spec), spec)
    got, wanted = by_tokens(back, spec), by_tokens(kv, spec)
    assert not np.isfinite(got[~np.isfinite(wanted)]).any()
    touched = ~np.isfinite(wanted).all(axis=-1)
    assert np.isfinite(got[~touched]).all()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [0.0, 1e-40, -3.0, 3e38])
def test_constant_kv_of_any_magnitude_comes_back(name: str, value: float) -> None:
    spec = make_spec("fp32", unused=5)
    kv = memoryview(bytearray(spec.size_bytes))
    as_bits(kv, "fp32").view(np.float32)[:] = value
    back = by_tokens(decoded(load_codec(name), encoded(load_codec(name), kv, spec), spec), spec)
    assert np.allclose(back, value, rtol=0.04, atol=1e-37)


def test_fp8_is_torchs_e4m3() -> None:
    ours = Fp8Codec()
    values = np.concatenate([np.linspace(-448, 448, 100_001), np.geomspace(1e-6, 448, 100_001)])
    values = values.astype(np.float32)
    out = np.empty(values.shape, np.uint8)
    ours.to_bytes(values.copy(), out)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(out, theirs)
    every = np.array([byte for byte in range(256) if byte & 0x7F != 0x7F], np.uint8)
    wanted = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(ours.from_bytes(every), wanted)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"first_layer": 5, "num_layers": 2}, "first_layer 5 and num_layers 2"),
        ({"first_layer": -1}, "first_layer -1"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"num_tokens": 0, "num_blocks": 0}, "num_blocks 0"),
        ({"num_tokens": 25}, "num_tokens 25"),
        ({"num_tokens": 16}, "num_tokens 16"),
    ],
)
def test_a_spec_that_does_not_fit_itself_is_refused(changed: dict[str, int], field: str) -> None:
    fields = {"num_blocks": 3, "num_tokens": 24, "first_layer": 0, "num_layers": 6} | changed
    with pytest.raises(TransferError, match=field):
        KvSpec(layout=make_spec().layout, **fields)


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_elements_survive_the_way_to_fp32_and_back(dtype: str) -> None:
    small = ITEM_BYTES[dtype] == 2
    counts = np.arange(0, 1 << (16 if small else 32), 1 if small else 65521, dtype=np.uint64)
    bits: Bits = counts.astype(np.uint16) if small else counts.astype(np.uint32)
    floats = to_floats(bits, dtype)
    if dtype == "fp16":
        assert np.array_equal(floats, bits.view(np.float16).astype(np.float32), equal_nan=True)
    back = np.empty_like(bits)
    numbers = ~np.isnan(floats)
    store_floats(floats.copy(), dtype, back)
    assert np.array_equal(back[numbers], bits[numbers])
    assert np.isnan(to_floats(back[~numbers], dtype)).all()


def test_bf16_rounds_to_nearest_even() -> None:
    floats = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3.3895e38], np.float32)
    out = np.empty(5, np.uint16)
    store_floats(floats.copy(), "bf16", out)
    assert to_floats(out, "bf16").tolist() == [1.0, 1.0, 1.015625, -1.0, 3.3895313892515355e38]

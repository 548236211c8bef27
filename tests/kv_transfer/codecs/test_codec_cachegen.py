"""What the CacheGen-like codec promises beyond the others: sizes, levels, escapes, and care where errors
count."""

from __future__ import annotations

import numpy as np
import pytest
from diphase.kv_transfer.codecs.codec import HEAD_BYTES, KvSpec, load_codec, write_head
from diphase.kv_transfer.codecs.codec_cachegen import _BODY, CacheGenCodec
from diphase.kv_transfer.codecs.codec_floats import Floats, as_bits, store_floats
from diphase.kv_transfer.codecs.range_coder import NUM_SYMBOLS, RowEncoder, Tables
from diphase.proto.errors import TransferError
from diphase.proto.kv_layout import KvLayout

from .test_codecs import by_tokens, decoded, encoded

LEVELS = ("cachegen-3", "cachegen-2", "cachegen-1")


def make_spec(num_tokens: int, dtype: str = "bf16", num_layers: int = 6) -> KvSpec:
    layout = KvLayout(
        model="m", num_layers=num_layers, num_kv_heads=2, head_dim=32, block_size=16, dtype=dtype
    )
    return KvSpec(
        layout=layout,
        num_blocks=layout.num_blocks_for(num_tokens),
        num_tokens=num_tokens,
        first_layer=0,
        num_layers=num_layers,
    )


def stored(tokens: Floats, spec: KvSpec) -> memoryview:
    """KV of values by token, [num_tokens, num_layers, 2, num_kv_heads, head_dim]; unused slots hold
    NaN."""
    layout = spec.layout
    slots = np.full((spec.num_blocks * layout.block_size, *tokens.shape[1:]), np.nan, np.float32)
    slots[: len(tokens)] = tokens
    blocks = slots.reshape(spec.num_blocks, layout.block_size, *tokens.shape[1:])
    kv = memoryview(bytearray(spec.size_bytes))
    canonical = np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1, 5))
    store_floats(canonical, layout.dtype, as_bits(kv, layout.dtype).reshape(spec.shape))
    return kv


def drawn(spec: KvSpec, seed: int = 0) -> Floats:
    """Standard normal values by token."""
    shape = (spec.num_tokens, spec.num_layers, 2, spec.layout.num_kv_heads, spec.layout.head_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def num_escapes(payload: memoryview) -> int:
    return int(_BODY.unpack_from(payload, HEAD_BYTES)[3])


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 10, 11, 16, 35, 250, 1000])
def test_any_number_of_tokens_comes_back_within_half_a_step(num_tokens: int) -> None:
    spec = make_spec(num_tokens)
    tokens = drawn(spec)
    kv = stored(tokens, spec)
    back = by_tokens(
        decoded(load_codec("cachegen-2"), encoded(load_codec("cachegen-2"), kv, spec), spec), spec
    )
    error = np.abs(back - by_tokens(kv, spec))
    spread = 1.3  # the largest of few values' may exceed 1
    assert error[:, :, 0].max() <= 0.25 * spread / 2 + 0.02
    assert error[:, :, 1].max() <= 0.5 * spread / 2 + 0.02


def test_unused_slots_are_zero_and_cost_nothing() -> None:
    spec = make_spec(17)
    payload = encoded(load_codec("cachegen-2"), stored(drawn(spec), spec), spec)
    assert num_escapes(payload) == 0
    back = decoded(load_codec("cachegen-2"), payload, spec)
    slots = as_bits(back, "bf16").reshape(spec.shape)
    assert not slots[-1, :, :, :, 1:].any()


def test_a_coarser_level_is_smaller_and_further_off() -> None:
    spec = make_spec(256)
    kv = stored(drawn(spec), spec)
    lengths, errors = [], []
    for name in LEVELS:
        payload = encoded(load_codec(name), kv, spec)
        back = by_tokens(decoded(load_codec(name), payload, spec), spec)
        lengths.append(len(payload))
        errors.append(float(np.square(back - by_tokens(kv, spec)).mean()))
    assert lengths == sorted(lengths, reverse=True)
    assert errors == sorted(errors)
    assert lengths[0] < 0.4 * spec.size_bytes


def test_thirds_of_the_models_layers_have_steps_of_their_own() -> None:
    whole = make_spec(64)
    tokens = drawn(whole)
    codec = CacheGenCodec("x", (0.1, 0.5, 1.0), (1.0, 0.5, 0.1))
    back = by_tokens(decoded(codec, encoded(codec, stored(tokens, whole), whole), whole), whole)
    error = np.square(back - tokens).mean(axis=(0, 3, 4))  # [num_layers, 2]
    assert (error[:2, 0] < error[2:4, 0]).all()
    assert (error[2:4, 0] < error[4:, 0]).all()
    assert (error[:2, 1] > error[2:4, 1]).all()
    # A push of some layers is quantised as they are in the whole.
    last = KvSpec(layout=whole.layout, num_blocks=4, num_tokens=64, first_layer=4, num_layers=2)
    part = by_tokens(decoded(codec, encoded(codec, stored(tokens[:, 4:], last), last), last), last)
    assert np.array_equal(part, back[:, 4:])


def test_values_out_of_range_travel_as_they_are() -> None:
    spec = make_spec(100)
    tokens = drawn(spec)
    tokens[0, 0, 0, 0, 0] = 3e4  # an anchor
    tokens[57, 3, 1, 1, 7] = -3e4
    payload = encoded(load_codec("cachegen-3"), stored(tokens, spec), spec)
    back = by_tokens(decoded(load_codec("cachegen-3"), payload, spec), spec)
    assert num_escapes(payload) >= 2
    assert back[0, 0, 0, 0, 0] == pytest.approx(3e4, rel=1 / 256)
    assert back[57, 3, 1, 1, 7] == pytest.approx(-3e4, rel=1 / 256)
    others = np.delete(np.arange(100), [*range(10), *range(50, 60)])
    assert np.abs(back[others, 1] - tokens[others, 1]).max() < 0.3


def test_a_token_of_small_values_is_quantised_finely() -> None:
    """Attention gathers on such tokens because they say nothing; noise on them would be heard everywhere."""
    spec = make_spec(200)
    tokens = drawn(spec)
    tokens[3] *= 0.05
    back = by_tokens(
        decoded(
            load_codec("cachegen-1"), encoded(load_codec("cachegen-1"), stored(tokens, spec), spec), spec
        ),
        spec,
    )
    error = np.sqrt(np.square(back - tokens).mean(axis=(1, 2, 3, 4)))
    assert error[3] < 0.1 * np.median(error)


def test_anchors_are_finer_than_the_tokens_after_them() -> None:
    spec = make_spec(200)
    tokens = drawn(spec)
    codec = load_codec("cachegen-1")
    error = np.square(
        by_tokens(decoded(codec, encoded(codec, stored(tokens, spec), spec), spec), spec) - tokens
    )
    by_token = error.mean(axis=(1, 2, 3, 4))
    anchors = np.arange(200) % 10 == 0
    assert by_token[anchors].max() < by_token[~anchors].min()


def test_likeness_to_the_anchor_makes_payloads_smaller() -> None:
    spec = make_spec(300)
    alike = np.repeat(drawn(spec)[::10], 10, axis=0) + 0.1 * drawn(spec, 1)
    shuffled = alike[np.random.default_rng(2).permutation(300)]
    sizes = [
        len(encoded(load_codec("cachegen-2"), stored(tokens, spec), spec)) for tokens in (alike, shuffled)
    ]
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_what_does_not_become_smaller_is_stored_whole(dtype: str) -> None:
    spec = make_spec(32, dtype, num_layers=1)
    kv = memoryview(bytearray(np.random.default_rng(0).bytes(spec.size_bytes)))
    codec = load_codec("cachegen-2")
    payload = encoded(codec, kv, spec)
    assert len(payload) == codec.max_bytes(spec)
    assert decoded(codec, payload, spec) == kv
    with pytest.raises(TransferError, match="stored KV is cut"):
        decoded(codec, payload[:-1], spec)


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, 7, "mode is 7"),
        (1, 0, "number of kinds 0"),
        (1, 33, "number of kinds 33"),
        (6, 255, "tables is cut"),
        (4, 255, "tables take"),
        (10, 255, "escapes is cut"),
        (8, 1, "lanes are"),
    ],
)
def test_a_damaged_body_head_is_refused_by_its_field(at: int, value: int, field: str) -> None:
    spec = make_spec(64)
    payload = encoded(load_codec("cachegen-2"), stored(drawn(spec), spec), spec)
    payload[HEAD_BYTES + at] = value
    with pytest.raises(TransferError, match=field):
        decoded(load_codec("cachegen-2"), payload, spec)


def test_escapes_that_nobody_asked_for_are_refused() -> None:
    """One more than the symbols name, with its bytes in place, so that all else is as it was."""
    spec = make_spec(64)
    payload = encoded(load_codec("cachegen-2"), stored(drawn(spec), spec), spec)
    _, num_kinds, table_bytes, escapes = _BODY.unpack_from(payload, HEAD_BYTES)
    stream = HEAD_BYTES + _BODY.size + 4 * spec.num_layers * 4 + num_kinds + table_bytes + 2 * escapes
    longer = bytearray(payload[:stream]) + b"\0\0" + payload[stream:]
    _BODY.pack_into(longer, HEAD_BYTES, 0, num_kinds, table_bytes, escapes + 1)
    with pytest.raises(TransferError, match=f"escapes are {escapes + 1} where {escapes} are expected"):
        decoded(load_codec("cachegen-2"), memoryview(longer), spec)


def crafted(spec: KvSpec, kind: int, shift: int) -> memoryview:
    """A well-formed payload of one kind of channels that names `kind` for the first channel and `shift`
    for the first head of the first token."""
    num_heads = spec.num_layers * 2 * spec.layout.num_kv_heads
    num_channels = num_heads * spec.layout.head_dim
    counts = np.zeros((4, NUM_SYMBOLS), np.int64)
    counts[0, [0, kind]] = counts[1, [0, shift]] = counts[2:, 128] = 1
    tables = Tables.fit(counts)
    kinds = np.zeros(num_channels, np.uint8)
    kinds[0] = kind
    row = np.full(num_heads + num_channels, 128, np.uint8)
    row[:num_heads] = 0
    encoder = RowEncoder(tables, spec.num_tokens + 1, len(row))
    for token in reversed(range(spec.num_tokens)):
        row[0] = 0 if token else shift
        of_values = np.full(num_channels, 2 if token % 10 else 3)
        encoder.put(row, np.concatenate([np.full(num_heads, 1), of_values]) * NUM_SYMBOLS)
    encoder.put(kinds, np.zeros(num_channels, np.intp))
    head = bytearray(HEAD_BYTES)
    write_head(memoryview(head), spec, 3, 1)
    steps = np.ones(num_heads, np.float32).tobytes()
    body = _BODY.pack(0, 1, len(tables.to_bytes()), 0)
    return memoryview(bytearray(head + body + steps + b"\0" + tables.to_bytes() + encoder.finish()))


def test_kinds_and_shifts_out_of_range_are_refused() -> None:
    spec = make_spec(20)
    codec = load_codec("cachegen-2")
    assert not any(decoded(codec, crafted(spec, 0, 5), spec))
    with pytest.raises(TransferError, match="kind 1 is none of its 1"):
        decoded(codec, crafted(spec, 1, 0), spec)
    with pytest.raises(TransferError, match="shift 6 is out of range"):
        decoded(codec, crafted(spec, 0, 6), spec)

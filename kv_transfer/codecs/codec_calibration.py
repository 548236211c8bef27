"""First estimates of a codec, before it has coded anything: drawn KV is encoded and decoded once, timed.

Drawn values have the spread of channels and heads that real KV has and none of its likeness between
tokens, so the first ratio is a cautious one; real hand-offs replace it.
"""

from __future__ import annotations

import numpy as np

from ...proto.clock import Clock
from ...proto.kv_layout import KvLayout
from .codec import Codec, KvSpec
from .codec_choice import CodecEstimate
from .codec_floats import as_bits, store_floats

_SAMPLE_BYTES = 4 * 1024 * 1024


def calibrate(codec: Codec, layout: KvLayout, clock: Clock) -> CodecEstimate:
    """Blocks for some tens of milliseconds; the first of two rounds, which pays for memory and imports,
    is not counted."""
    num_layers = max(1, min(layout.num_layers, _SAMPLE_BYTES // layout.layer_bytes))
    num_blocks = max(1, _SAMPLE_BYTES // (num_layers * layout.layer_bytes))
    spec = KvSpec(
        layout=layout,
        num_blocks=num_blocks,
        num_tokens=num_blocks * layout.block_size,
        first_layer=0,
        num_layers=num_layers,
    )
    kv, back = memoryview(bytearray(spec.size_bytes)), memoryview(bytearray(spec.size_bytes))
    rng = np.random.default_rng(0)
    values = rng.standard_normal(spec.shape, np.float32)
    values *= np.exp(0.5 * rng.standard_normal((num_layers, 2, layout.num_kv_heads, 1, 1), np.float32))
    store_floats(values, layout.dtype, as_bits(kv, layout.dtype).reshape(spec.shape))
    out = memoryview(bytearray(codec.max_bytes(spec)))
    for _ in range(2):
        estimate = CodecEstimate()
        began = clock.now()
        length = codec.encode(kv, spec, out)
        encoded = clock.now()
        codec.decode(out[:length], spec, back)
        estimate.encoded(spec.size_bytes, length, encoded - began)
        estimate.decoded(spec.size_bytes, clock.now() - encoded)
    return estimate

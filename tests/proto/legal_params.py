"""Every combination of sampling parameters that a request may have, for hypothesis."""

from __future__ import annotations

import numpy as np
from diphase.proto.sampling import (
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    SamplingParams,
)
from hypothesis import strategies as st


def f32(low: float, high: float, **options: bool) -> st.SearchStrategy[float]:
    """Floats that the wire carries unchanged; it rounds the bounds, too."""
    return st.floats(np.float32(low).item(), np.float32(high).item(), width=32, **options)


def sampling_params(max_token_id: int = 2**32 - 1) -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        max_tokens=st.integers(10, 2**31 - 1),
        min_tokens=st.integers(0, 10),
        temperature=st.just(0.0) | f32(MIN_TEMPERATURE, 100.0),
        top_k=st.integers(0, 8) | st.integers(0, 2**31 - 1),
        top_p=f32(0, 1, exclude_min=True),
        min_p=f32(0, 1),
        repetition_penalty=f32(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        presence_penalty=f32(-2, 2),
        frequency_penalty=f32(-2, 2),
        seed=st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
        stop_token_ids=st.lists(st.integers(0, max_token_id), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20),
    )

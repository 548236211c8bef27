from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from diphase.engine.base import SampledToken
from diphase.engine.sampler import highest, sample, uniform
from diphase.engine.sequence import Sequence
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo
from hypothesis import given
from hypothesis import strategies as st

from ..proto.legal_params import sampling_params

VOCAB = 300
EOS = (3,)


def sequence(
    params: SamplingParams, prompt: list[int] | None = None, generated: list[int] | None = None
) -> Sequence:
    prompt = prompt or [1, 2]
    return Sequence(
        key=HandoffKey("r", 0),
        gateway_id="",
        token_ids=[*prompt, *(generated or [])],
        num_prompt_tokens=len(prompt),
        params=params,
        slo=Slo(),
        arrived_at=0.0,
    )


def logits(seed: int = 0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def sample_one(row: torch.Tensor, params: SamplingParams, **history: list[int]) -> SampledToken:
    return sample(row.unsqueeze(0), [sequence(params, **history)], EOS)[0]


def reference_ids(row: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Probabilities after the filters, written out one token at a time."""
    scaled = [value / params.temperature for value in row.tolist()]
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    weight = {i: math.exp(scaled[i] - max(scaled)) for i in ranked}
    whole, kept, reached = sum(weight.values()), [], 0.0
    for i in ranked:
        if reached >= params.top_p * whole:
            break
        kept.append(i)
        reached += weight[i]
    kept = [i for i in kept if weight[i] >= params.min_p]
    return {i: weight[i] / sum(weight[j] for j in kept) for i in kept}


def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_equal_ones() -> None:
    rows = torch.zeros(3, VOCAB, dtype=torch.bfloat16)
    rows[0, 7] = 1.0
    rows[1, 250] = rows[1, 40] = rows[1, 41] = 2.0
    tokens = sample(rows, [sequence(SamplingParams()) for _ in range(3)], EOS)
    assert [token.token_id for token in tokens] == [7, 40, 0]


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 1},
        {"top_k": 12},
        {"top_k": VOCAB + 5},
        {"top_p": 0.7},
        {"top_p": 0.9999},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.3, "top_p": 0.95},
        {"temperature": 40.0, "top_p": 0.9},
    ],
)
def test_tokens_come_with_the_probability_that_the_filters_leave(filters: dict[str, float]) -> None:
    row = logits()
    row[10] = row[20] = row[30] = row.max()  # ties at the top: filters cut them by id
    num_draws = 3000
    params = SamplingParams(**{"temperature": 1.0, "seed": 11, **filters})  # type: ignore[arg-type]
    expected = reference_ids(row, params)
    counts = Counter(sample_one(row, params, generated=[0] * index).token_id for index in range(num_draws))
    assert set(counts) <= set(expected)
    for token_id, probability in expected.items():
        spread = 5 * math.sqrt(probability * (1 - probability) * num_draws) + 1
        assert abs(counts[token_id] - probability * num_draws) <= spread


def test_a_tail_that_top_p_needs_is_found_beyond_the_first_candidates() -> None:
    """One likely token and a flat tail far below it that holds most of the probability."""
    row = torch.full((50_000,), -9.0)
    row[123] = 0.0
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
    drawn = {sample_one(row, params, generated=[0] * index).token_id for index in range(60)}
    assert len(drawn) > 30


def test_the_random_number_is_a_function_of_seed_and_index_alone() -> None:
    row = logits()
    params = SamplingParams(temperature=1.0, seed=5)
    alone = sample_one(row, params, generated=[9, 9]).token_id
    others = [sequence(SamplingParams(temperature=1.0, seed=i), generated=[1] * i) for i in range(4)]
    batch = sample(row.repeat(5, 1), [*others, sequence(params, prompt=[4] * 7, generated=[8, 8])], EOS)
    assert batch[4].token_id == alone
    assert len({sample_one(row, params, generated=[0] * i).token_id for i in range(20)}) > 5


def test_uniform_numbers_are_even_and_unrelated() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    deciles = Counter(int(number * 10) for number in numbers)
    assert all(abs(count - 1000) < 150 for count in deciles.values())
    pairs = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) / len(numbers)
    assert abs(pairs) < 0.003
    assert uniform(2**64 - 1, 2**31) != uniform(2**64 - 1, 2**31 + 1)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    row = torch.full((VOCAB,), -5.0)
    row[50], row[60], row[70] = 3.0, 2.0, 1.0
    params = SamplingParams(repetition_penalty=2.0)
    assert sample_one(row, params).token_id == 50
    assert sample_one(row, params, prompt=[50]).token_id == 60
    assert sample_one(row, params, prompt=[50], generated=[60]).token_id == 50
    row = torch.full((VOCAB,), -2.0)
    row[50] = -1.5
    assert sample_one(row, params, prompt=[50, 0]).token_id == 1


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    row = torch.zeros(VOCAB)
    row[50], row[60] = 1.0, 0.5
    presence, frequency = SamplingParams(presence_penalty=0.8), SamplingParams(frequency_penalty=0.3)
    for params in (presence, frequency):
        assert sample_one(row, params, prompt=[50, 50, 50]).token_id == 50
    assert sample_one(row, presence, generated=[50]).token_id == 60
    assert sample_one(row, frequency, generated=[50]).token_id == 50
    assert sample_one(row, frequency, generated=[50, 50]).token_id == 60
    assert sample_one(row, SamplingParams(presence_penalty=-1.0), generated=[60]).token_id == 60


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_eos_and_stop_tokens_are_masked_below_min_tokens(temperature: float) -> None:
    row = torch.zeros(VOCAB)
    row[EOS[0]], row[9], row[100] = 9.0, 8.0, 7.0
    params = SamplingParams(min_tokens=2, stop_token_ids=(9, VOCAB + 1), temperature=temperature)
    assert sample_one(row, params).token_id == 100
    assert sample_one(row, params, generated=[5]).token_id == 100
    assert sample_one(row, params, generated=[5, 5]).token_id == EOS[0]
    assert sample(row.unsqueeze(0), [sequence(SamplingParams(min_tokens=1))], ())[0].token_id == EOS[0]


def test_logprobs_are_those_before_penalties_and_filters() -> None:
    row = logits()
    row[77] = row[88] = row.max() + 1.0
    params = SamplingParams(
        logprobs=4, temperature=0.7, top_k=1, repetition_penalty=9.0, min_tokens=5, seed=3
    )
    token = sample_one(row, params, prompt=[77, 88])
    expected = torch.log_softmax(row, dim=0)
    assert token.token_id not in (77, 88)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [i for i, _ in token.top][:2] == [77, 88]
    assert [value for _, value in token.top] == pytest.approx(expected.topk(4).values.tolist())
    assert sample_one(row, SamplingParams(logprobs=0)).top == []
    assert sample_one(row, SamplingParams()).top == []


def test_highest_ranks_equal_values_by_id() -> None:
    row = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 3.0, 0.0])
    assert highest(row, 4).tolist() == [1, 3, 2, 4]
    assert highest(row, 20).tolist() == [1, 3, 2, 4, 5, 0, 6]
    assert highest(row, 0).tolist() == []


def test_logits_are_left_as_they_were() -> None:
    rows = logits().repeat(2, 1)
    kept = rows.clone()
    params = SamplingParams(
        temperature=0.5, top_p=0.5, repetition_penalty=2.0, presence_penalty=1.0, min_tokens=3, logprobs=2
    )
    sample(rows, [sequence(params, generated=[4]), sequence(SamplingParams())], EOS)
    assert torch.equal(rows, kept)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), [], EOS) == []


HUGE = torch.finfo(torch.float32).max
SMALL_VOCAB = 12


def logit_rows() -> st.SearchStrategy[torch.Tensor]:
    """Finite logits of a small vocabulary, with whatever float32 can hold next to each other."""
    extremes = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, HUGE, -HUGE])
    value = (
        extremes | st.floats(-30, 30, width=32) | st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
    return st.lists(value, min_size=SMALL_VOCAB, max_size=SMALL_VOCAB).map(torch.tensor)


@given(
    logit_rows(),
    sampling_params(max_token_id=SMALL_VOCAB + 1),
    st.lists(st.integers(0, SMALL_VOCAB - 1), max_size=30),
)
def test_any_legal_parameters_and_any_logits_give_a_token_of_the_vocabulary(
    row: torch.Tensor, params: SamplingParams, generated: list[int]
) -> None:
    [token] = sample(row.unsqueeze(0), [sequence(params, generated=generated)], (3, SMALL_VOCAB))
    assert 0 <= token.token_id < SMALL_VOCAB
    masked = {3, *params.stop_token_ids} if len(generated) < params.min_tokens else set()
    assert token.token_id not in masked
    if params.logprobs is not None:
        assert token.logprob <= 0.0
        assert len(token.top) == min(params.logprobs, SMALL_VOCAB)
        assert all(math.isfinite(value) for value in [token.logprob, *(value for _, value in token.top)])


@pytest.mark.parametrize("penalty", [0.1, 1e-40])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_penalties_that_leave_the_range_of_numbers_do_not_fail_the_batch(
    penalty: float, filters: dict[str, float]
) -> None:
    """Whatever came past the check of parameters: the logits of seen tokens become infinite."""
    params = SamplingParams(**{"temperature": 1.0, "repetition_penalty": 0.1, **filters})  # type: ignore[arg-type]
    object.__setattr__(params, "repetition_penalty", penalty)
    row = torch.full((VOCAB,), -1.0)
    row[5] = row[7] = 3e38 if penalty == 0.1 else 1.0
    plain = sequence(SamplingParams())
    tokens = sample(row.repeat(2, 1), [sequence(params, prompt=[5, 7]), plain], EOS)
    assert tokens[0].token_id in (5, 7)
    assert tokens[1].token_id == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_still_give_a_token(value: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=2)
    row = logits()
    row[::2] = value
    token = sample_one(row, params)
    assert (token.token_id % 2 == 0) is (value == math.inf)
    assert len(token.top) == 2
    assert 0 <= sample_one(torch.full((VOCAB,), value), params).token_id < VOCAB


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_vocabulary_of_nothing_but_masked_tokens_still_gives_one(temperature: float) -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(0, 1, 2), temperature=temperature)
    assert sample_one(torch.zeros(4), params).token_id in range(4)

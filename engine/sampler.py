"""Chooses tokens from logits. Stateless: what it draws is a function of logits, sequence and parameters
alone.

Order: log-probabilities are taken first; then repetition, presence and frequency penalties, the mask of
min_tokens, temperature, top-k, top-p (of what top-k left) and min-p. Equal logits rank by id, the lowest
first, everywhere.

Whatever the logits are, every row gives a token of the vocabulary: one that raised would take the whole batch
with it. Hence _LIMIT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import torch

from ..proto.sampling import SamplingParams
from .base import SampledToken
from .sequence import Sequence

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MARGINS = (8.0, 16.0, math.inf)
"""How far below the highest logit the candidates of a filter are looked for, in turn: e^-8 of the highest
probability is nearly always far enough, and sorting hundreds costs a hundredth of sorting the vocabulary."""

_LIMIT = torch.finfo(torch.float32).max / 2
"""Logits are brought between -_LIMIT and _LIMIT: differences of any two are finite. What is not a number is
as unlikely as can be."""
_MASKED = torch.finfo(torch.float32).min
"""The logit of what must not be sampled: below all others, and finite, so that a row of nothing else still
has a distribution."""


def uniform(seed: int, index: int) -> float:
    """The random number of token `index`, in [0, 1): 53 bits of SplitMix64 (Steele et al., 2014) at a counter
    that mixes both, so that no draw depends on another."""
    return (_mix((_mix(seed + _GOLDEN) + (index + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def sample(
    logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: tuple[int, ...]
) -> list[SampledToken]:
    """One token a row.

    Args:
        logits: [len(sequences), vocab_size] of any floating dtype; not changed.
        eos_token_ids: masked, with a request's stop tokens, below its min_tokens.
    """
    if not sequences:
        return []
    if all(_is_plain(sequence) for sequence in sequences):
        # The first of equal values, as argmax() gives it, which is slower: it does not vectorise on bf16.
        return [SampledToken(token_id=i) for i in logits.max(dim=1).indices.tolist()]
    return [
        _sample_row(row, sequence, eos_token_ids) for row, sequence in zip(logits, sequences, strict=True)
    ]


def _is_plain(sequence: Sequence) -> bool:
    """Greedy with nothing else to do."""
    params = sequence.params
    return (
        params.greedy
        and params.logprobs is None
        and not params.needs_history
        and sequence.num_generated >= params.min_tokens
    )


def _sample_row(row: torch.Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> SampledToken:
    params = sequence.params
    if _is_plain(sequence):
        return SampledToken(token_id=int(row.max(dim=0).indices))
    row = row.to(torch.float32, copy=True).nan_to_num_(nan=-_LIMIT).clamp_(-_LIMIT, _LIMIT)
    logprobs = None if params.logprobs is None else torch.log_softmax(row, dim=0)
    if params.needs_history:
        _penalise(row, sequence)
    if sequence.num_generated < params.min_tokens:
        row[_inside((*eos_token_ids, *params.stop_token_ids), len(row))] = _MASKED
    token_id = int(row.argmax()) if params.greedy else _draw(row, params, sequence.num_generated)
    token = SampledToken(token_id=token_id)
    if logprobs is not None:
        token.logprob = float(logprobs[token_id])
        token.top = [(i, float(logprobs[i])) for i in highest(logprobs, params.logprobs or 0).tolist()]
    return token


def _inside(token_ids: tuple[int, ...], vocab_size: int) -> list[int]:
    """Those that exist: one that the vocabulary lacks is never sampled anyway."""
    return [token_id for token_id in token_ids if 0 <= token_id < vocab_size]


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """Changes fp32 logits [vocab_size] in place, as SamplingParams describes the penalties; within _LIMIT."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids).unique()
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    generated = sequence.token_ids[sequence.num_prompt_tokens :]
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(generated).unique(return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    row.clamp_(-_LIMIT, _LIMIT)


def _draw(row: torch.Tensor, params: SamplingParams, index: int) -> int:
    """Inverse of the distribution function at the token's random number; fp32 logits [vocab_size]."""
    row = (row - row.max()).div_(params.temperature)
    filtered = params.top_k or params.top_p < 1.0 or params.min_p
    ids = _keep(row, params) if filtered else None
    weights = (row if ids is None else row[ids]).double().exp_()
    cumulative = weights.cumsum(dim=0)
    target = uniform(params.seed, index) * float(cumulative[-1])
    chosen = int(torch.searchsorted(cumulative, target, right=True))
    if chosen == len(weights):  # rounding: the last one that has any probability
        chosen = int(weights.nonzero()[-1])
    return chosen if ids is None else int(ids[chosen])


def _keep(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids that the filters leave, most likely first; row: fp32 logits, the highest 0."""
    ids = _candidates(row, params)
    if params.top_k:
        ids = ids[: params.top_k]
    if params.top_p < 1.0:
        weights = row[ids].double().exp_()
        whole = weights.sum() if params.top_k else row.double().exp_().sum()
        reached = torch.searchsorted(weights.cumsum(dim=0), params.top_p * whole)
        ids = ids[: int(reached) + 1]
    if params.min_p:
        ids = ids[row[ids] >= math.log(params.min_p)]
    return ids


def _candidates(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids of all logits above a bound that is low enough for top_k and top_p, sorted, most likely first."""
    if params.min_p and not params.top_k and params.top_p == 1.0:
        return _sorted_above(row, math.log(params.min_p))
    whole = row.exp().sum()
    for margin in _MARGINS:
        above = row >= -margin
        if params.top_k and int(above.sum()) < params.top_k and margin < math.inf:
            continue
        # Half a per mille more than asked for: these sums are in fp32, those of _keep in fp64.
        if not params.top_k and row[above].exp().sum() < params.top_p * 1.0005 * whole and margin < math.inf:
            continue
        break
    return _sorted_above(row, -margin)


def _sorted_above(row: torch.Tensor, bound: float) -> torch.Tensor:
    ids = (row >= bound).nonzero().squeeze(1)
    order = torch.sort(row[ids], descending=True, stable=True).indices
    return ids[order]


def highest(row: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` highest values, highest first, equal ones by id."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    bound = torch.topk(row, min(count, len(row))).values[-1]
    return _sorted_above(row, float(bound))[:count]

"""KV as small integers, the first half of the `cachegen` codec: tokens in groups of ten, of which the
first is the anchor and the others may be deltas against it (CacheGen, SIGCOMM'24, section 5.2).

What differs from the paper, and why, is in docs/decisions.md: the step of a head is a share of the spread
of its values, a token of small magnitude gets a finer step, and a channel is coded against the anchor
only where that makes it smaller. Values outside eight bits, and what is not finite, are escapes and
travel as they are. Knows no payloads and no entropy coding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .codec_floats import TILE_ITEMS, Bits, Floats, store_floats, to_floats

GROUP = 10
"""Tokens a group."""
ESCAPE = 0
_ZERO = 128
"""The symbol of the value 0."""
_LARGEST = 127.0
NUM_SHIFTS = 6
"""A step is halved up to five times for tokens of small magnitude: of those that gather attention without
saying anything ("sinks"), values are small and errors count."""
_ANCHOR_SHIFT = 1
"""Anchors are quantised twice as finely."""
_SAMPLE_GROUPS = 24
_SMALLEST_SPREAD = np.float32(1 / 32)
"""Of values about their mean, as a share of their magnitude: below it, values count as constant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How the heads of a chunk are quantised. A head is one K or V head of one layer."""

    steps: Floats
    """[num_heads]; not a number: all values of this head are escapes."""
    predicted: NDArray[np.bool_]
    """[num_heads, head_dim]: which channels are deltas against the anchor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbols:
    """A chunk as small integers. The arrays may be views into larger ones."""

    values: NDArray[np.uint8]
    """[num_tokens, num_heads * head_dim]; 1 to 255, or ESCAPE."""
    shifts: NDArray[np.uint8]
    """[num_tokens, num_heads]: how often a head's step is halved for this token."""


def anchor_rows(num_tokens: int) -> NDArray[np.bool_]:
    """Which tokens are anchors, [num_tokens]."""
    anchors: NDArray[np.bool_] = np.arange(num_tokens) % GROUP == 0
    return anchors


def sample_rows(num_tokens: int) -> NDArray[np.intp]:
    """Tokens that statistics are taken of: whole groups, the first one among them, evenly spread."""
    num_groups = -(-num_tokens // GROUP)
    groups = np.arange(0, num_groups, -(-num_groups // _SAMPLE_GROUPS))
    rows = (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    return rows[rows < num_tokens]


def quantise(bits: Bits, dtype: str, shares: Floats, symbols: Symbols) -> tuple[Steps, list[Bits]]:
    """Fills `symbols` with the chunk `bits` [num_tokens, num_heads, head_dim].

    Args:
        shares: [num_heads], step as a share of the spread of a head's values.

    Returns:
        What restores them: the steps, and the elements of the escapes in the order of tokens and channels,
        in pieces.
    """
    num_tokens, num_heads, head_dim = bits.shape
    steps, usual = _measure(to_floats(bits[sample_rows(num_tokens)], dtype), shares)
    inverse = np.reciprocal(steps.steps)
    escapes: list[Bits] = []
    for rows in _tiles(bits.shape):
        values = to_floats(bits[rows], dtype)
        shifts = _shifts(values, usual)
        symbols.shifts[rows] = shifts
        shifts[::GROUP] += _ANCHOR_SHIFT
        inverses = np.ldexp(inverse, shifts)[:, :, None]
        # Of a symbol that will be an escape the decoder sees no value: such an anchor predicts 0.
        anchors = values[::GROUP] * inverses[::GROUP]
        np.rint(anchors, out=anchors)
        anchors[~(np.abs(anchors) <= _LARGEST)] = 0.0
        anchors *= np.ldexp(steps.steps, -shifts[::GROUP])[:, :, None]
        values -= _predictions(anchors, steps.predicted, len(values))
        values *= inverses
        np.rint(values, out=values)
        outside = ~(np.abs(values) <= _LARGEST)
        values += _ZERO
        if outside.any():
            values[outside] = ESCAPE
            escapes.append(bits[rows][outside])
        np.copyto(symbols.values[rows], values.reshape(-1, num_heads * head_dim), casting="unsafe")
    return steps, escapes


def restore(symbols: Symbols, steps: Steps, escapes: Bits, dtype: str, out: Bits) -> int:
    """The inverse of quantise(), into `out` [num_tokens, num_heads, head_dim].

    Args:
        escapes: elements in the order of tokens and channels; of this chunk first, others may follow.

    Returns:
        How many escapes there are among the symbols: more than `escapes` when those were too few, and then
        `out` is worth nothing.
    """
    used = 0
    for rows in _tiles(out.shape):
        coded = symbols.values[rows].reshape(-1, *out.shape[1:])
        values = coded.astype(np.float32)
        values -= _ZERO
        outside = coded == ESCAPE
        escaped = bool(outside.any())
        if escaped:
            values[outside] = 0.0
        shifts = symbols.shifts[rows].astype(np.int32)
        shifts[::GROUP] += _ANCHOR_SHIFT
        values *= np.ldexp(steps.steps, -shifts)[:, :, None]
        values += _predictions(values[::GROUP], steps.predicted, len(values))
        target = out[rows]
        store_floats(values, dtype, target)
        if escaped:
            count = int(np.count_nonzero(outside))
            if used + count <= len(escapes):
                target[outside] = escapes[used : used + count]
            used += count
    return used


def _tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """Whole groups of tokens that convert within a core's cache."""
    num_tokens, num_heads, head_dim = shape
    step = max(1, TILE_ITEMS // (num_heads * head_dim * GROUP)) * GROUP
    for begin in range(0, num_tokens, step):
        yield slice(begin, min(begin + step, num_tokens))


def _predictions(anchors: Floats, predicted: NDArray[np.bool_], num_tokens: int) -> Floats:
    """What each of `num_tokens` is coded against: its group's anchor in predicted channels, else 0."""
    predictions = np.repeat(anchors * predicted, GROUP, axis=0)[:num_tokens]
    predictions[::GROUP] = 0.0
    return predictions


def _shifts(values: Floats, usual: Floats) -> NDArray[np.int32]:
    """How often the step is halved, [num_tokens, num_heads]: as often as the usual magnitude of the head is
    about twice that of the token."""
    squares = np.einsum("thd,thd->th", values, values)
    # Magnitudes are compared by their squares: 2 * square / usual^2 in [1/4, 1) is one shift.
    _, exponents = np.frexp(squares * (2.0 / np.square(usual)))
    shifts: NDArray[np.int32] = np.clip((2 - exponents) // 2, 0, NUM_SHIFTS - 1).astype(np.int32)
    return shifts


def _measure(sample: Floats, shares: Floats) -> tuple[Steps, Floats]:
    """Steps for values like these, [num_tokens, num_heads, head_dim], and the usual magnitude of each
    head."""
    squares = np.square(sample)
    usual = np.sqrt(np.median(squares.sum(axis=2), axis=0))
    magnitude = np.sqrt(squares.mean(axis=(0, 2)))
    if len(sample) < GROUP:  # too few to tell a channel's mean from its spread
        spread = magnitude / 2
    else:
        spread = np.sqrt(np.maximum(squares.mean(axis=0) - np.square(sample.mean(axis=0)), 0.0).mean(axis=1))
    steps = np.maximum(spread, magnitude * _SMALLEST_SPREAD) * shares
    steps[magnitude == 0.0] = 1.0
    steps[~np.isfinite(steps)] = np.nan
    anchors = np.repeat(sample[::GROUP], GROUP, axis=0)[: len(sample)]
    alone = np.abs(sample).sum(axis=0)
    against = np.abs(sample - anchors).sum(axis=0) + np.abs(sample[::GROUP]).sum(axis=0)
    return Steps(steps=steps, predicted=against < alone), usual

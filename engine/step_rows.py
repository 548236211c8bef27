"""The rows of one step, as rank 0 plans them and every rank computes them, and their form on the wire: int64
numbers and nothing else. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
from numpy.typing import NDArray

from ..kernels.paged_attention import Segment
from ..proto.errors import InternalError

_HEAD = 4
"""Numbers in front: tokens, segments, entries of all block tables, whether there are prompts."""
_SEGMENT = 4
"""Numbers of a segment: first position, rows, whether it is single, entries of its block table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Tokens in the order of the step's rows."""

    table: NDArray[np.int64]
    """[4, num_tokens]: token ids, positions, block ids, slots."""
    segments: list[Segment]
    prompts: bool
    """Whether the step is multiplied as one that computes prompts."""

    def to_bytes(self) -> bytes:
        tables = [segment.block_table for segment in self.segments]
        numbers = [(s.first_position, s.num_rows, int(s.single), len(s.block_table)) for s in self.segments]
        ids = np.fromiter(chain.from_iterable(tables), np.int64)
        head = np.array([self.table.shape[1], len(numbers), len(ids), int(self.prompts)], np.int64)
        segments = np.array(numbers, np.int64).reshape(-1)
        return np.concatenate((head, segments, ids, self.table.reshape(-1))).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> StepRows:
        """
        Raises:
            InternalError: the bytes are not those of to_bytes().
        """
        if len(data) % 8 or len(data) < 8 * _HEAD:
            raise InternalError(f"a step of {len(data)} bytes has no head or no whole numbers")
        numbers = np.frombuffer(data, np.int64)
        num_tokens, num_segments, num_ids, prompts = numbers[:_HEAD].tolist()
        sizes = (_HEAD, _SEGMENT * num_segments, num_ids, 4 * num_tokens)
        if min(sizes) < 0 or sum(sizes) != len(numbers) or prompts not in {0, 1}:
            raise InternalError(f"a step of {len(numbers)} numbers names {sizes} of them")
        ends = list(accumulate(sizes))
        described = numbers[ends[0] : ends[1]].reshape(-1, _SEGMENT).tolist()
        ids = numbers[ends[1] : ends[2]].tolist()
        table_ends = list(accumulate((row[3] for row in described), initial=0))
        if table_ends[-1] != num_ids or sum(row[1] for row in described) != num_tokens:
            raise InternalError("the segments of a step do not cover its tokens and block tables")
        segments = [
            Segment(block_table=ids[begin:end], first_position=first, num_rows=num_rows, single=bool(single))
            for (first, num_rows, single, _), (begin, end) in zip(
                described, pairwise(table_ends), strict=True
            )
        ]
        # A copy: torch takes no tensor of memory that cannot be written.
        return cls(
            table=numbers[ends[2] :].reshape(4, num_tokens).copy(), segments=segments, prompts=bool(prompts)
        )

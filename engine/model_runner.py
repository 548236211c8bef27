"""Turns a StepPlan into the rows of one step and the logits of the rows that sample. Knows no sampling.

Order of the rows: decoding tokens first, by context length, since attention computes neighbours of one length
together; then prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.paged_attention import Segment
from ..proto.errors import InternalError
from .base import Chunk, LayerHook, StepPlan
from .llama import Llama, StepTensors
from .sequence import Sequence
from .step_rows import StepRows


@dataclass(slots=True, kw_only=True)
class _Piece:
    """A segment and where its tokens come from."""

    sequence: Sequence
    segment: Segment


class ModelRunner:
    """One model on one pool; one step at a time. With `batch_invariant`, every step is multiplied as one with
    prompts."""

    def __init__(
        self,
        model: Llama,
        block_size: int,
        *,
        batch_invariant: bool = False,
        announce: Callable[[bytes], None] | None = None,
    ) -> None:
        """`announce` has the other ranks compute the same rows (StepRows); None when there are none."""
        self._model = model
        self._announce = announce
        self._block_size = block_size
        self._batch_invariant = batch_invariant

    def run(self, plan: StepPlan, on_layer: LayerHook | None = None) -> torch.Tensor:
        """Computes the plan's tokens. Returns the logits of its sampling chunks in their order,
        [num_sampling_chunks, vocab_size].

        Raises:
            InternalError: a chunk names tokens or blocks that its sequence does not have.
        """
        singles: list[_Piece] = []
        prompts: list[_Piece] = []
        for chunk in plan.chunks:
            _check(chunk, self._block_size)
            for piece in self._pieces(chunk):
                (singles if piece.segment.single else prompts).append(piece)
        padded_length = self._model.attention.padded_length
        singles.sort(key=lambda piece: padded_length(piece.segment.first_position + 1))
        pieces = singles + prompts
        rows = self._rows(pieces)
        if self._announce is not None:
            self._announce(rows.to_bytes())
        hidden = self._model.forward(step_tensors(self._model, rows), on_layer)
        return self._model.logits(hidden[_sampling_rows(plan, pieces)])

    def _pieces(self, chunk: Chunk) -> list[_Piece]:
        """The chunk as segments: whole, or where attention's bits would tell, generated tokens one by one."""
        sequence, first = chunk.sequence, chunk.sequence.num_computed
        end = first + chunk.num_tokens
        if self._model.attention.row_invariant:
            return [_piece(sequence, first, chunk.num_tokens, single=chunk.num_tokens == 1)]
        split = min(max(first, sequence.num_prompt_tokens), end)
        pieces = [_piece(sequence, first, split - first, single=False)] if split > first else []
        return pieces + [_piece(sequence, position, 1, single=True) for position in range(split, end)]

    def _rows(self, pieces: list[_Piece]) -> StepRows:
        num_tokens = sum(piece.segment.num_rows for piece in pieces)
        prompts = self._batch_invariant or any(
            piece.segment.num_rows > 1 or piece.segment.first_position < piece.sequence.num_prompt_tokens
            for piece in pieces
        )
        table: NDArray[np.int64] = np.empty((4, num_tokens), np.int64)
        row = 0
        for piece in pieces:
            segment = piece.segment
            first, count = segment.first_position, segment.num_rows
            columns = slice(row, row + count)
            table[0, columns] = piece.sequence.token_ids[first : first + count]
            table[1, columns] = np.arange(first, first + count)
            first_block, last_block = first // self._block_size, (first + count - 1) // self._block_size
            blocks = np.array(segment.block_table[first_block : last_block + 1])
            table[2, columns] = blocks[table[1, columns] // self._block_size - first_block]
            row += count
        np.remainder(table[1], self._block_size, out=table[3])
        return StepRows(table=table, segments=[piece.segment for piece in pieces], prompts=prompts)


def step_tensors(model: Llama, rows: StepRows) -> StepTensors:
    """The rows as one rank's model takes them."""
    attention = model.attention.plan(rows.segments)
    tensor = torch.from_numpy(rows.table)
    return StepTensors(
        num_rows=model.padded_rows(tensor.shape[1], rows.prompts),
        token_ids=tensor[0],
        positions=tensor[1],
        block_ids=tensor[2],
        slots=tensor[3],
        attention=attention,
    )


def _piece(sequence: Sequence, first: int, num_rows: int, *, single: bool) -> _Piece:
    segment = Segment(
        block_table=sequence.block_table, first_position=first, num_rows=num_rows, single=single
    )
    return _Piece(sequence=sequence, segment=segment)


def _sampling_rows(plan: StepPlan, pieces: list[_Piece]) -> list[int]:
    """The row of the last token of each chunk that samples, in the plan's order."""
    last_row: dict[int, int] = {}
    row = 0
    for piece in pieces:
        row += piece.segment.num_rows
        if piece.segment.first_position + piece.segment.num_rows == piece.sequence.num_tokens:
            last_row[id(piece.sequence)] = row - 1
    return [last_row[id(chunk.sequence)] for chunk in plan.chunks if chunk.samples]


def _check(chunk: Chunk, block_size: int) -> None:
    sequence = chunk.sequence
    end = sequence.num_computed + chunk.num_tokens
    if chunk.num_tokens < 1 or end > sequence.num_tokens:
        raise InternalError(
            f"a chunk of {chunk.num_tokens} tokens at {sequence.num_computed} of {sequence.num_tokens}: "
            f"request {sequence.key.request_id}"
        )
    if end > len(sequence.block_table) * block_size:
        raise InternalError(
            f"{len(sequence.block_table)} blocks do not hold {end} tokens: request {sequence.key.request_id}"
        )
    if chunk.samples and end != sequence.num_tokens:
        raise InternalError(
            f"a chunk samples before its sequence's last token: request {sequence.key.request_id}"
        )

"""Paged attention out of torch's own operators: gather a sequence's blocks, then
scaled_dot_product_attention.

Decoding rows of equal padded context go together, as many as fit in the second-level cache; their query heads
that share a key-value head become the rows of one matrix. Prompts are cut into tiles of rows, and a tile sees
only the context it needs.

How a row's bits stay the same in any company: a row's padded context is a function of its position alone, and
the matrices have a multiple of four rows (with others, the matrix library was seen to sum in another order
when it is called from several threads). Where that is
enough, which is measured when the object is made, the rest is free. Where it is not, or where fp32 is faster
for decode, a row that was decoded once is always computed in decode's way, and prompts always in full tiles
at aligned positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..proto.errors import KernelError
from .paged_attention import Segment, check_pool, check_rows

_MATRIX_ROWS = 4
"""Matrices have a multiple of it."""
_ALIGN = 64
"""Padded contexts are multiples of it; softmax and matrix products then have no ragged ends."""
_TILE = 128
_ALIGNED_TILE = 64
_GATHER_BYTES = 1 << 20
"""Keys and values gathered at once for decoding rows: half of a 2 MiB second-level cache."""


def padded_length(num_positions: int) -> int:
    """The smallest allowed context length that holds `num_positions`: multiples of 64 up to 512, of 128 up to
    1,024 and so on, so that few lengths exist and at most a fifth is waste beyond the first 256."""
    step = _ALIGN
    while num_positions > 8 * step:
        step *= 2
    return -(-num_positions // step) * step


@dataclass(slots=True)
class _Tile:
    """Rows [begin, end) of a prompt; rows up to `matrix_end`, whosever they are, are computed with them and
    dropped."""

    begin: int
    end: int
    matrix_end: int
    mask: torch.Tensor  # [matrix_end - begin, length]: 0 or -inf

    @property
    def length(self) -> int:
        return self.mask.shape[1]


@dataclass(slots=True)
class _Group:
    """What is gathered at once: `num_sequences` contexts of `length` positions."""

    num_sequences: int
    length: int
    index: slice  # of the step's gather index
    row: int = 0
    mask: torch.Tensor | None = None  # decoding rows: [num_sequences, 1, 1, length]
    tiles: list[_Tile] = field(default_factory=list)  # a prompt


class CpuPagedAttention:
    """Owns the scratch memory of the gathers; one step at a time."""

    def __init__(self, pool: torch.Tensor, num_q_heads: int, max_context: int) -> None:
        check_pool(pool, num_q_heads)
        num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = pool.shape
        if _ALIGN % block_size:
            raise KernelError(f"block_size {block_size} must divide {_ALIGN}, the step of padded contexts")
        self.pool = pool
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.group_size = num_q_heads // num_kv_heads
        self.upcast = pool.dtype is torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
        self.row_invariant = not self.upcast and _is_row_invariant(
            num_kv_heads, self.group_size, head_dim, pool.dtype
        )
        self.tile_rows = _TILE if self.row_invariant else _ALIGNED_TILE
        # One gathered row is what one head keeps in one block: [num_rows, block_size * head_dim].
        self.head_blocks = pool.view(num_blocks * num_layers * 2 * num_kv_heads, block_size * head_dim)
        self._max_position = -(-max_context // self.tile_rows) * self.tile_rows
        # One matrix whose column ranges are all causal masks: that of a tile which begins at position p
        # starts at column max_position - p.
        width = self._max_position + self.tile_rows + max(_ALIGN, self._max_position // 4)
        self._bands = _causal_mask(self.tile_rows, width, self._max_position, pool.dtype)
        self._scratch = torch.empty(0, dtype=pool.dtype)
        self._wide = torch.empty(0, dtype=torch.float32)

    def padded_length(self, num_positions: int) -> int:
        return padded_length(num_positions)

    def plan(self, segments: Sequence[Segment]) -> CpuAttentionStep:
        groups: list[_Group] = []
        indices: list[NDArray[np.int64]] = []
        row = num_indices = 0
        for members in self._grouped(segments):
            group = self._decode_group(members, row) if members[0].single else self._prompt(members[0], row)
            index = self._gather_index(members, group.length)
            group.index = slice(num_indices, num_indices + index.size)
            groups.append(group)
            indices.append(index)
            num_indices += index.size
            row += sum(segment.num_rows for segment in members)
        # One layer's rows lie behind the layer's before: [num_layers, indices of a layer].
        layers = np.arange(self.pool.shape[1], dtype=np.int64) * (2 * self.num_kv_heads)
        table = torch.from_numpy(layers[:, None] + np.concatenate(indices))
        return CpuAttentionStep(self, groups, table, row)

    def gathered(self, index: torch.Tensor, group: _Group) -> torch.Tensor:
        """[num_sequences, 2, num_kv_heads, length, head_dim] out of the scratch memory."""
        width = self.head_blocks.shape[1]
        size = index.numel() * width
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self.pool.dtype)
        rows = self._scratch[:size].view(-1, width)
        torch.index_select(self.head_blocks, 0, index, out=rows)
        return rows.view(group.num_sequences, 2, self.num_kv_heads, group.length, -1)

    def widened(self, kv: torch.Tensor) -> torch.Tensor:
        """The same in fp32."""
        if self._wide.numel() < kv.numel():
            self._wide = torch.empty(kv.numel(), dtype=torch.float32)
        return self._wide[: kv.numel()].view(kv.shape).copy_(kv)

    def _grouped(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Neighbouring single rows of one padded length together, as far as the scratch should reach."""
        grouped: list[list[Segment]] = []
        length = room = 0
        for segment in segments:
            own = padded_length(segment.first_position + 1)
            if segment.single and grouped and grouped[-1][0].single and own == length and room > 0:
                grouped[-1].append(segment)
                room -= 1
                continue
            grouped.append([segment])
            length = own
            row_bytes = 2 * self.num_kv_heads * length * self.pool.shape[5] * self.pool.element_size()
            room = _GATHER_BYTES // row_bytes - 1
        return grouped

    def _decode_group(self, members: list[Segment], row: int) -> _Group:
        length = padded_length(members[0].first_position + 1)
        last = torch.tensor([segment.first_position for segment in members]).view(-1, 1, 1, 1)
        mask = torch.zeros(
            len(members), 1, 1, length, dtype=torch.float32 if self.upcast else self.pool.dtype
        )
        mask.masked_fill_(torch.arange(length) > last, float("-inf"))
        return _Group(len(members), length, slice(0), row=row, mask=mask)

    def _prompt(self, segment: Segment, row: int) -> _Group:
        tiles: list[_Tile] = []
        position, end = segment.first_position, segment.first_position + segment.num_rows
        while position < end:
            tile_end = (position // self.tile_rows + 1) * self.tile_rows
            num_rows = min(tile_end, end) - position
            matrix_rows = num_rows + -num_rows % _MATRIX_ROWS if self.row_invariant else self.tile_rows
            left = self._max_position - position
            mask = self._bands[:matrix_rows, left : left + padded_length(tile_end)]
            tiles.append(_Tile(row, row + num_rows, row + matrix_rows, mask))
            row += num_rows
            position += num_rows
        return _Group(1, tiles[-1].length, slice(0), tiles=tiles)

    def _gather_index(self, members: list[Segment], length: int) -> NDArray[np.int64]:
        """Rows of head_blocks of layer 0, ordered [sequence, k|v, kv_head, block]. Tables that are shorter
        than the padded length are continued with their first block, whose content is masked."""
        _, num_layers, _, num_kv_heads, block_size, _ = self.pool.shape
        num_blocks = -(-length // block_size)
        tables = np.empty((len(members), num_blocks), np.int64)
        for i, segment in enumerate(members):
            used = -(-(segment.first_position + segment.num_rows) // block_size)
            tables[i, :used] = segment.block_table[:used]
            tables[i, used:] = segment.block_table[0]
        heads = np.arange(2 * num_kv_heads, dtype=np.int64)
        return (tables[:, None, :] * (num_layers * 2 * num_kv_heads) + heads[None, :, None]).reshape(-1)


class CpuAttentionStep:
    """The groups of one step and where their blocks lie."""

    def __init__(
        self, attention: CpuPagedAttention, groups: list[_Group], index: torch.Tensor, num_rows: int
    ) -> None:
        self._num_rows = num_rows
        self._attention = attention
        self._groups = groups
        self._index = index

    def run(self, out: torch.Tensor, q: torch.Tensor, layer: int) -> None:
        attention = self._attention
        check_rows(out, q, self._num_rows, attention.num_q_heads, attention.pool)
        index = self._index[layer]
        for group in self._groups:
            kv = attention.gathered(index[group.index], group)
            if group.mask is not None:
                self._decode(out, q, group, group.mask, kv)
            else:
                self._prefill(out, q, group, kv)

    def _decode(
        self, out: torch.Tensor, q: torch.Tensor, group: _Group, mask: torch.Tensor, kv: torch.Tensor
    ) -> None:
        attention = self._attention
        rows = slice(group.row, group.row + group.num_sequences)
        shape = (group.num_sequences, attention.num_kv_heads, attention.group_size, q.shape[2])
        heads = fold_heads(q[rows].view(shape))
        if attention.upcast:
            heads, kv = heads.float(), attention.widened(kv)
        result = F.scaled_dot_product_attention(heads, kv[:, 0], kv[:, 1], attn_mask=mask)
        out[rows].view(shape).copy_(result[:, :, : attention.group_size])

    def _prefill(self, out: torch.Tensor, q: torch.Tensor, group: _Group, kv: torch.Tensor) -> None:
        keys, values = kv[:, 0], kv[:, 1]
        for tile in group.tiles:
            rows = q[tile.begin : tile.matrix_end]
            if missing := tile.matrix_end - tile.begin - len(rows):
                rows = F.pad(rows, (0, 0, 0, 0, 0, missing))
            result = F.scaled_dot_product_attention(
                rows.transpose(0, 1).unsqueeze(0),  # [1, num_q_heads, rows, head_dim]
                keys[:, :, : tile.length],
                values[:, :, : tile.length],
                attn_mask=tile.mask,
                enable_gqa=True,
            )
            out[tile.begin : tile.end] = result[0].transpose(0, 1)[: tile.end - tile.begin]


def fold_heads(q: torch.Tensor) -> torch.Tensor:
    """[batch, num_kv_heads, group_size, head_dim], each group followed by rows of 0 that make _MATRIX_ROWS of
    it."""
    return F.pad(q, (0, 0, 0, -q.shape[2] % _MATRIX_ROWS))


def _causal_mask(num_rows: int, num_columns: int, position: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_rows, num_columns]: row i stands at `position` + i and may look at columns up to there (0), not
    beyond (-inf)."""
    hidden = torch.arange(num_columns) > position + torch.arange(num_rows).unsqueeze(1)
    return torch.zeros(num_rows, num_columns, dtype=dtype).masked_fill_(hidden, float("-inf"))


@cache
def _is_row_invariant(num_kv_heads: int, group_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether rows computed alone, in decode's way, have the bits they have inside prompt tiles of several
    sizes and paddings: tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    context, num_rows = 192, 64

    def draw(heads: int, length: int, scale: float) -> torch.Tensor:
        return (torch.randn(1, heads, length, head_dim, generator=generator) * scale).to(dtype)

    q = draw(num_kv_heads * group_size, num_rows, 2.0)
    k, v = draw(num_kv_heads, context, 1.0), draw(num_kv_heads, context, 1.0)
    first = context - num_rows - _ALIGN
    mask = _causal_mask(num_rows, context, first, dtype)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for begin, end, length in ((0, 4, context), (8, 20, context - _ALIGN), (28, 64, context)):
        part = F.scaled_dot_product_attention(
            q[:, :, begin:end],
            k[:, :, :length],
            v[:, :, :length],
            attn_mask=mask[begin:end, :length],
            enable_gqa=True,
        )
        if not torch.equal(part, whole[:, :, begin:end]):
            return False
    for row in range(num_rows):
        length = padded_length(first + row + 1)
        alone = F.scaled_dot_product_attention(
            fold_heads(q[:, :, row].view(1, num_kv_heads, group_size, head_dim)),
            k[:, :, :length],
            v[:, :, :length],
            attn_mask=mask[row, :length].view(1, 1, 1, length),
        )
        if not torch.equal(alone[:, :, :group_size].reshape(1, -1, head_dim), whole[:, :, row]):
            return False
    return True

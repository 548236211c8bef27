"""The fake engine: real blocks and real KV bytes, no model. For tests, simulations and the router's
benchmarks.

The KV of a token is a hash of (token id, position, layer); the next token is a hash of the KV bytes of the
whole context *as they are read from the pool*. A block that is lost, stale or in the wrong place therefore
changes the output, and `continuation` says what the output has to be. Steps take the time that a StepCost
names: in the engine thread through `sleep`, or on an event loop (virtual time) through `execute_on_loop`.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..proto.errors import DiphaseError
from ..proto.kv_layout import ITEM_BYTES, UNSHARDED, KvLayout
from ..proto.sampling import SamplingParams
from .base import Chunk, KvRegion, LayerHook, ModelLimits, SampledToken, StepPlan, StepResult

FAKE_LAYOUT = KvLayout(model="fake", num_layers=2, num_kv_heads=1, head_dim=4, block_size=16, dtype="bf16")
FAKE_LIMITS = ModelLimits(name="fake", context_length=4096, vocab_size=1000, eos_token_ids=(2,))

_WORD = np.uint64
_MULTIPLIERS = (_WORD(0x9E3779B97F4A7C15), _WORD(0xBF58476D1CE4E5B9), _WORD(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds that a step takes: base + what its chunks add."""

    base_s: float = 0.0
    prefill_token_s: float = 0.0
    """For each token of a chunk of more than one."""
    decode_sequence_s: float = 0.0
    """For each decoding sequence."""
    context_token_s: float = 0.0
    """For each token of context that a decoding sequence reads."""

    def of(self, plan: StepPlan) -> float:
        seconds = self.base_s
        for chunk in plan.chunks:
            if chunk.num_tokens > 1:
                seconds += self.prefill_token_s * chunk.num_tokens
            else:
                seconds += self.decode_sequence_s + self.context_token_s * chunk.sequence.num_computed
        return seconds


class FakeEngine:
    """Implements engine/base.py's Engine. The pool is a memfd, so that other processes may map it."""

    def __init__(
        self,
        *,
        num_blocks: int,
        layout: KvLayout = FAKE_LAYOUT,
        limits: ModelLimits = FAKE_LIMITS,
        cost: StepCost | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.layout = layout
        self.sharding = UNSHARDED
        self.limits = limits
        self.num_blocks = num_blocks
        self.cost = cost or StepCost()
        self._sleep = sleep
        size_bytes = max(num_blocks, 1) * layout.block_bytes
        self._fd: int | None = os.memfd_create("diphase-fake-kv")
        os.ftruncate(self._fd, size_bytes)
        self._map = mmap.mmap(self._fd, size_bytes)
        self.kv_buffer = memoryview(self._map)
        # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_bytes]
        self._pool = np.frombuffer(self.kv_buffer, np.uint8)[: num_blocks * layout.block_bytes].reshape(
            num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, -1
        )

    @property
    def kv_regions(self) -> list[KvRegion]:
        return [] if self._fd is None else [KvRegion(buffer=self.kv_buffer, fd=self._fd)]

    def execute(self, plan: StepPlan, on_layer: LayerHook | None = None) -> StepResult:
        seconds = self.cost.of(plan)
        pause_s = seconds / self.layout.num_layers
        for layer in self._write_layers(plan):
            if self._sleep is not None and pause_s:
                self._sleep(pause_s)
            if on_layer is not None:
                on_layer(layer)
        return self._sample(plan, seconds)

    async def execute_on_loop(self, plan: StepPlan, on_layer: LayerHook | None = None) -> StepResult:
        """`execute` for an event loop: waits by its clock. Cancelled, it leaves KV half written and no
        token."""
        seconds = self.cost.of(plan)
        for layer in self._write_layers(plan):
            await asyncio.sleep(seconds / self.layout.num_layers)
            if on_layer is not None:
                on_layer(layer)
        return self._sample(plan, seconds)

    def continuation(self, prompt: Sequence[int], params: SamplingParams, num_tokens: int) -> list[int]:
        """The `num_tokens` tokens that follow `prompt`, computed without a pool and without finishing
        early."""
        token_ids = list(prompt)
        for index in range(num_tokens):
            kv = self._kv_of(np.array(token_ids, np.uint64), 0)
            token_ids.append(self._choose(kv.tobytes(), index, params).token_id)
        return token_ids[len(prompt) :]

    def watch(self, lost: Callable[[DiphaseError], None]) -> None:
        """It has no parts that it could lose."""

    def close(self) -> None:
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        # The mapping itself goes with the last view of it, which a transport may still hold.
        del self._pool

    def _write_layers(self, plan: StepPlan) -> Iterator[int]:
        new = [self._new_kv(chunk) for chunk in plan.chunks]
        for layer in range(self.layout.num_layers):
            for blocks, slots, kv in new:
                # Indexed [token, k|v, head, byte]: numpy moves the two index arrays' axis to the front.
                self._pool[blocks, layer, :, :, slots, :] = kv[:, layer]
            yield layer

    def _new_kv(self, chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """Blocks and slots [num_tokens], and the KV [num_tokens, num_layers, 2, num_kv_heads, head_bytes]."""
        sequence = chunk.sequence
        first, last = sequence.num_computed, sequence.num_computed + chunk.num_tokens
        positions = np.arange(first, last)
        table = np.array(sequence.block_table, np.int64)
        token_ids = np.array(sequence.token_ids[first:last], np.uint64)
        size = self.layout.block_size
        return table[positions // size], positions % size, self._kv_of(token_ids, first)

    def _kv_of(self, token_ids: NDArray[np.uint64], first: int) -> NDArray[np.uint8]:
        """What the KV of tokens at positions first, first + 1, … is: [n, num_layers, 2, num_kv_heads,
        head_bytes]."""
        layout = self.layout
        head_bytes = layout.head_dim * ITEM_BYTES[layout.dtype]
        row_bytes = 2 * layout.num_kv_heads * head_bytes
        words = np.arange(-(-row_bytes // 8), dtype=_WORD) + _WORD(1)
        positions = np.arange(first, first + len(token_ids), dtype=_WORD) + _WORD(1)
        layers = np.arange(layout.num_layers, dtype=_WORD) + _WORD(1)
        mixed = (token_ids + _WORD(1)) * _MULTIPLIERS[0] ^ positions * _MULTIPLIERS[1]
        mixed = mixed[:, None] ^ layers * _MULTIPLIERS[2]
        mixed = (mixed[:, :, None] ^ (mixed[:, :, None] >> _WORD(31))) * _MULTIPLIERS[
            1
        ] ^ words * _MULTIPLIERS[0]
        mixed ^= mixed >> _WORD(29)
        rows = np.ascontiguousarray(mixed).view(np.uint8)[:, :, :row_bytes]
        return rows.reshape(len(token_ids), layout.num_layers, 2, layout.num_kv_heads, head_bytes)

    def _sample(self, plan: StepPlan, seconds: float) -> StepResult:
        tokens: list[SampledToken | None] = []
        for chunk in plan.chunks:
            if not chunk.samples:
                tokens.append(None)
                continue
            sequence = chunk.sequence
            length = sequence.num_computed + chunk.num_tokens
            blocks = self._pool[sequence.block_table[: self.layout.num_blocks_for(length)]]
            # [blocks, slots, layers, 2, heads, bytes]: by token, so that the block size does not matter
            context = blocks.transpose(0, 4, 1, 2, 3, 5).reshape(-1, self.layout.token_bytes)[:length]
            tokens.append(self._choose(context.tobytes(), sequence.num_generated, sequence.params))
        return StepResult(tokens=tokens, duration_s=seconds)

    def _choose(self, context: bytes, index: int, params: SamplingParams) -> SampledToken:
        banned = {*self.limits.eos_token_ids, *params.stop_token_ids} if index < params.min_tokens else set()
        state = xxhash.xxh64_intdigest(context, 0 if params.greedy else params.seed ^ index)
        ranked: list[int] = []
        while len(ranked) < max(1, params.logprobs or 0):
            token_id = state % self.limits.vocab_size
            if token_id not in banned and token_id not in ranked:
                ranked.append(token_id)
            state = xxhash.xxh64_intdigest(state.to_bytes(8, "little"))
        if params.logprobs is None:
            return SampledToken(token_id=ranked[0])
        top = [(token_id, -0.5 - rank) for rank, token_id in enumerate(ranked[: params.logprobs])]
        return SampledToken(token_id=ranked[0], logprob=-0.5, top=top)

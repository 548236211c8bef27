"""Generation without a cluster: one engine, every prompt at once. Tests and benchmarks take its output as the
truth.

The simplest continuous batching that there is: first come, first served; each step decodes what runs and
prefills what fits the budget. It shares block manager, chunking and finish rules with the workers, and no
scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from ..proto.errors import InvalidRequest, OutOfBlocks
from ..proto.ids import HandoffKey
from ..proto.sampling import SamplingParams
from ..proto.slo import Slo
from .base import Chunk, Engine, SampledToken, StepPlan
from .block_manager import BlockManager
from .chunking import next_chunk
from .engine import TorchEngine
from .requests import NOT_FINISHED, append_sampled
from .sequence import Sequence

WHOLE = 1 << 30
"""A chunk budget that no prompt reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How steps are put together; none of it may change what is generated."""

    max_running: int = 16
    """Sequences that decode together, at most."""
    chunk_tokens: int = 512
    """Prompt tokens a step, at most."""
    preempt_every: int = 0
    """Every so many steps the youngest running sequence loses its blocks and is computed anew; 0: only when
    blocks run out."""


def generate(
    engine: Engine,
    prompts: Rows[Rows[int]],
    params: SamplingParams | Rows[SamplingParams],
    batching: Batching | None = None,
) -> list[list[SampledToken]]:
    """The completions of `prompts`, in their order; a stop or eos token is included.

    Args:
        params: of all prompts, or one for each.

    Raises:
        InvalidRequest: a prompt and its completion do not fit the engine's pool even alone.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    sequences = [_sequence(i, list(prompt), each[i]) for i, prompt in enumerate(prompts)]
    run = _Run(engine, sequences, batching or Batching())
    while run.waiting or run.running:
        run.step()
    return [run.outputs[sequence.key] for sequence in sequences]


def _sequence(index: int, token_ids: list[int], params: SamplingParams) -> Sequence:
    return Sequence(
        key=HandoffKey(f"prompt-{index}", 0),
        gateway_id="",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=params,
        slo=Slo(),
        arrived_at=0.0,
    )


class _Run:
    """One call of generate."""

    def __init__(self, engine: Engine, sequences: list[Sequence], batching: Batching) -> None:
        self.waiting = list(sequences)
        self.running: list[Sequence] = []
        self.outputs: dict[HandoffKey, list[SampledToken]] = {sequence.key: [] for sequence in sequences}
        self._engine = engine
        self._batching = batching
        self._blocks = BlockManager(engine.num_blocks, engine.layout.block_size)
        self._num_steps = 0

    def step(self) -> None:
        self._num_steps += 1
        if self._batching.preempt_every and self._num_steps % self._batching.preempt_every == 0:
            self._preempt()
        self._admit()
        plan = self._plan()
        result = self._engine.execute(plan)
        for chunk, token in zip(plan.chunks, result.tokens, strict=True):
            chunk.sequence.num_computed += chunk.num_tokens
            if token is not None:
                self._append(chunk.sequence, token)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._batching.max_running:
            if not self._grow(self.waiting[0]):
                break
            self.running.append(self.waiting.pop(0))
        if not self.running:
            raise InvalidRequest(
                f"{self.waiting[0].num_tokens} tokens do not fit {self._engine.num_blocks} KV blocks"
            )

    def _plan(self) -> StepPlan:
        chunks: list[Chunk] = []
        budget = self._batching.chunk_tokens
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for an older one
                continue
            while not self._grow(sequence):
                self._preempt()
                if sequence not in self.running:
                    break
            else:
                if sequence.num_uncomputed == 1:
                    chunks.append(Chunk(sequence=sequence, num_tokens=1, samples=True))
                elif chunk := next_chunk(sequence, budget, self._engine.layout.block_size):
                    chunks.append(chunk)
                    budget -= chunk.num_tokens
        return StepPlan(chunks=chunks)

    def _grow(self, sequence: Sequence) -> bool:
        """Whether the sequence has blocks for all its tokens now."""
        missing = self._engine.layout.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        try:
            sequence.block_table += self._blocks.allocate(max(missing, 0))
        except OutOfBlocks:
            return False
        return True

    def _preempt(self) -> None:
        """The youngest running sequence goes back to the head of the queue, with its tokens and without
        KV."""
        if not self.running:
            return
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.insert(0, sequence)

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        self.outputs[sequence.key].append(token)
        outcome = append_sampled(sequence, token, self._engine.limits)
        if outcome.finish_reason != NOT_FINISHED:
            self.running.remove(sequence)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeError:
    """How far the logits of one position lie apart when its context was decoded and when it is prefilled."""

    largest: float
    """Largest absolute difference of a logit."""
    top_two_gap: float
    """Between the two highest of the decoded logits: below `largest`, either may come out on top."""


def recompute_error(engine: TorchEngine, prompt: Rows[int], num_tokens: int) -> RecomputeError:
    """Decodes `num_tokens` greedy tokens after the prompt, then prefills all of them anew, and compares the
    logits of the last position. This is what preemption and a lost worker do to a sequence."""
    sequence = _sequence(0, list(prompt), SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    sequence.block_table = list(range(engine.layout.num_blocks_for(len(prompt) + num_tokens)))
    decoded = _logits(engine, sequence)
    for _ in range(num_tokens):
        sequence.num_computed = sequence.num_tokens
        sequence.token_ids.append(int(decoded.argmax()))
        decoded = _logits(engine, sequence)
    sequence.num_computed = 0
    prefilled = _logits(engine, sequence)
    top = decoded.topk(2).values
    return RecomputeError(
        largest=float((decoded - prefilled).abs().max()), top_two_gap=float(top[0] - top[1])
    )


def _logits(engine: TorchEngine, sequence: Sequence) -> torch.Tensor:
    """Of the sequence's last token, fp32 [vocab_size]."""
    chunk = Chunk(sequence=sequence, num_tokens=sequence.num_uncomputed, samples=True)
    return engine.logits(StepPlan(chunks=[chunk]))[0].float()

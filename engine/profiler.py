"""How long the engine's steps take, over a grid of steps: what the planner's step times are fitted to.

It asks the engine that it is given for single steps and notes their times. It knows no scheduler, no fit and
no torch: whoever calls it loads the engine (engine.py) or brings a fake one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ..proto.clock import Clock
from ..proto.errors import ConfigError
from ..proto.ids import HandoffKey
from ..proto.sampling import SamplingParams
from ..proto.slo import Slo
from ..proto.worker_pb2 import StepSample
from .base import Chunk, Engine, StepPlan
from .sequence import Sequence as TokenSequence
from .step_predictor import describe

FIRST_CHUNKS = (8, 24, 40, 72, 104, 152, 216, 296, 360, 424, 512, 1024)
"""Prompt tokens without context. Most lie off the multiples of 16 to 128 in which engines compute rows: a fit
through multiples alone takes the padding of all other prompts to cost nothing."""
LATER_TOKENS = (24, 104, 232, 376, 512)
LATER_CONTEXTS = (512, 2048)
"""Of prompts that were computed, or cached, up to there."""
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (64, 256, 1024)
MIXED_TOKENS = (40, 104, 232, 360, 512)
MIXED_BATCHES = (2, 8, 32)
MIXED_CONTEXTS = (256, 1024)
"""Of the decoding sequences beside first chunks and beside later ones."""
MIXED_LATER = ((40, 512), (232, 512), (232, 2048), (360, 512), (512, 1024))
"""(tokens, context before) of prompts under way in mixed steps, beside MIXED_BATCHES[1] sequences."""
SHORT_PROMPTS = ((4, 28), (2, 72))
"""(prompts, tokens of each) of steps in which several prompts share a step."""
LEAST_CELLS = {"prefill": 5, "decode": 5, "mixed": 7}
"""Of a kind, that a fit with one of them held out can be made."""
MOST_REPEATS = 4
"""Timed runs of a cell in one round."""
REPEATS_S = 0.25
"""Of a cell in one round: a long step is run once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of step: prompts of equal lengths, decoding sequences of equal contexts, or both."""

    prompts: int = 0
    prompt_tokens: int = 0
    """Of each prompt, computed in this step."""
    prompt_context: int = 0
    """Of each prompt, computed before."""
    decode_batch: int = 0
    decode_context: int = 0
    """Of each decoding sequence, with the token that it computes."""

    @property
    def kind(self) -> str:
        """prefill, decode or mixed."""
        if self.prompts and self.decode_batch:
            return "mixed"
        return "prefill" if self.prompts else "decode"

    def blocks(self, block_size: int) -> int:
        """KV blocks that its sequences hold."""
        prompt = -(-(self.prompt_context + self.prompt_tokens) // block_size)
        return self.prompts * prompt + self.decode_batch * -(-self.decode_context // block_size)


REFERENCE_CELLS = {
    "prefill": Cell(prompts=1, prompt_tokens=256),
    "decode": Cell(decode_batch=4, decode_context=256),
}
"""What is timed while a neighbour runs one of the two, and to know how fast the machine is just now, beside
when its profile was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTimes:
    """A cell and what its steps took."""

    cell: Cell
    sample: StepSample
    """In the terms of the latency model; without a time."""
    seconds: list[float]

    @property
    def median_s(self) -> float:
        return median(self.seconds)


def make_grid(
    *, chunk_budget: int, max_running: int, num_blocks: int, block_size: int, context_length: int
) -> list[Cell]:
    """The cells that workers with such limits can meet.

    Raises:
        ConfigError: the pool is too small for a grid that a fit could be made of.
    """
    first = sorted({*FIRST_CHUNKS, min(chunk_budget, FIRST_CHUNKS[-1])})
    cells = [Cell(prompts=1, prompt_tokens=tokens) for tokens in first]
    cells += [
        Cell(prompts=1, prompt_tokens=tokens, prompt_context=context)
        for tokens in LATER_TOKENS
        for context in LATER_CONTEXTS
    ]
    cells += [Cell(prompts=prompts, prompt_tokens=tokens) for prompts, tokens in SHORT_PROMPTS]
    cells += [
        Cell(decode_batch=batch, decode_context=context)
        for batch in DECODE_BATCHES
        for context in DECODE_CONTEXTS
    ]
    cells += [
        Cell(prompts=1, prompt_tokens=tokens, decode_batch=batch, decode_context=MIXED_CONTEXTS[0])
        for tokens in MIXED_TOKENS
        for batch in MIXED_BATCHES
    ]
    cells += [
        Cell(
            prompts=1,
            prompt_tokens=tokens,
            prompt_context=context,
            decode_batch=MIXED_BATCHES[1],
            decode_context=MIXED_CONTEXTS[1],
        )
        for tokens, context in MIXED_LATER
    ]

    def possible(cell: Cell) -> bool:
        longest = max(cell.prompt_context + cell.prompt_tokens, cell.decode_context)
        return (
            cell.prompts * cell.prompt_tokens <= chunk_budget
            and cell.decode_batch <= max_running
            and longest < context_length
            and cell.blocks(block_size) <= num_blocks
        )

    grid = [cell for cell in cells if possible(cell)]
    grid += [cell for cell in REFERENCE_CELLS.values() if cell not in grid]
    for kind, least in LEAST_CELLS.items():
        count = sum(cell.kind == kind for cell in grid)
        if count < least:
            raise ConfigError(
                f"a KV pool of {num_blocks} blocks of {block_size} tokens and a context of {context_length} "
                f"allow {count} kinds of {kind} steps only; raise engine.kv_cache_mib for the profile"
            )
    return grid


def profile_steps(
    engine: Engine,
    grid: Sequence[Cell],
    *,
    rounds: int,
    clock: Clock,
    on_round: Callable[[int], None] = lambda _: None,
) -> list[CellTimes]:
    """Runs every cell in `rounds` rounds after one that warms up and is not counted. Each round takes the
    cells in another order, so that a disturbance of the machine, or a drift of its speed, meets all kinds of
    them. Nobody else may use the engine or its pool meanwhile."""
    rng = random.Random(0)
    plans = [(cell, _plan_of(cell, engine, rng)) for cell in grid]
    found = [CellTimes(cell=cell, sample=describe(plan), seconds=[]) for cell, plan in plans]
    order = list(range(len(grid)))
    for number in range(rounds + 1):
        rng.shuffle(order)
        for i in order:
            seconds = _visit(engine, plans[i][1], clock)
            if number:
                found[i].seconds.extend(seconds)
        on_round(number)
    return found


def _visit(engine: Engine, plan: StepPlan, clock: Clock) -> list[float]:
    """Times of a few runs of a step, after one that is not counted where the step is short: its cells are in
    the caches of whoever ran before."""
    seconds: list[float] = []
    spent = 0.0
    skip = True
    while spent < REPEATS_S and len(seconds) < MOST_REPEATS:
        began = clock.now()
        engine.execute(plan)
        took = clock.now() - began
        spent += took
        if not skip or took > REPEATS_S:
            seconds.append(took)
        skip = False
    return seconds


def _plan_of(cell: Cell, engine: Engine, rng: random.Random) -> StepPlan:
    """The step, over blocks that lie scattered over the pool."""
    block_size = engine.layout.block_size
    blocks = rng.sample(range(engine.num_blocks), cell.blocks(block_size))

    def sequence(length: int, computed: int, prompt: int) -> TokenSequence:
        count = -(-length // block_size)
        table, blocks[:count] = blocks[:count], []
        return TokenSequence(
            key=HandoffKey("profile", 0),
            gateway_id="",
            token_ids=[rng.randrange(engine.limits.vocab_size) for _ in range(length)],
            num_prompt_tokens=prompt,
            params=SamplingParams(),
            slo=Slo(),
            arrived_at=0.0,
            block_table=table,
            num_computed=computed,
        )

    chunks = []
    for _ in range(cell.decode_batch):
        # Its last token is a generated one: engines compute tokens of a prompt in another way.
        one = sequence(cell.decode_context, cell.decode_context - 1, cell.decode_context - 1)
        chunks.append(Chunk(sequence=one, num_tokens=1, samples=True))
    for _ in range(cell.prompts):
        length = cell.prompt_context + cell.prompt_tokens
        one = sequence(length, cell.prompt_context, length)
        chunks.append(Chunk(sequence=one, num_tokens=cell.prompt_tokens, samples=True))
    return StepPlan(chunks=chunks)


REFERENCE_VISITS = 5
IDLE = "idle"


def time_references(
    engine: Engine, clock: Clock, prepare: Callable[[str], None] = lambda _: None
) -> dict[str, float]:
    """Median seconds of each of REFERENCE_CELLS; `prepare` is called with a kind before each visit to it."""
    rng = random.Random(1)
    plans = {kind: _plan_of(cell, engine, rng) for kind, cell in REFERENCE_CELLS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in plans}
    for _ in range(REFERENCE_VISITS):
        for kind, plan in plans.items():
            prepare(kind)
            times[kind] += _visit(engine, plan, clock)
    return {kind: median(seconds) for kind, seconds in times.items()}


def profile_slowdowns(
    engine: Engine, tell: Callable[[str], None], *, rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """How much longer steps take while a neighbour on the same machine computes, too: of what this engine
    runs, by what the neighbour runs; 1 where it does not matter. Cores share caches, memory and more.

    `tell` has the neighbour run one kind of REFERENCE_CELLS, or IDLE, and returns when it does.
    """
    rng = random.Random(1)
    plans = {kind: _plan_of(cell, engine, rng) for kind, cell in REFERENCE_CELLS.items()}
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        times: dict[tuple[str, str], float] = {}
        for beside in (IDLE, *plans) if number % 2 else (*plans, IDLE):
            tell(beside)
            for own, plan in plans.items():
                times[own, beside] = median(_visit(engine, plan, clock))
        # Within a round, so that a machine whose speed wanders is compared with itself.
        for own in plans if number else ():
            for beside in plans:
                ratios.setdefault((own, beside), []).append(times[own, beside] / times[own, IDLE])
    tell(IDLE)
    return {own: {beside: max(1.0, median(ratios[own, beside])) for beside in plans} for own in plans}


def run_steps(engine: Engine, kind: str, go_on: Callable[[], bool]) -> None:
    """What a neighbour does: steps of one kind of REFERENCE_CELLS for as long as `go_on` says so."""
    plan = _plan_of(REFERENCE_CELLS[kind], engine, random.Random(2))
    while go_on():
        engine.execute(plan)

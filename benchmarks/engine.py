"""How fast the engine is on one core, beside eager transformers in the same run, on the same weights.

    .venv/bin/python -P benchmarks/engine.py [--rounds 5]   # writes docs/results/engine.json

Prefill of 512 tokens, and decode steps at several batch sizes and contexts; bf16 and int8. The engines take
turns within each round, so that a disturbance of the machine meets all of them; reported are medians and the
fastest. The floor is what reading all bf16 weights once takes at the speed of this process's own sum over a
buffer of that size.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import transformers
from diphase.benchmarks import harness
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.checkpoints.weights import open_weights
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.engine.kv_pool import TORCH_DTYPES
from diphase.engine.sequence import Sequence as Request
from diphase.engine.weights import drawn_tensors
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama import LlamaConfig

PREFILL_TOKENS = 512
PREFILL = f"prefill {PREFILL_TOKENS}"
DECODE = ((1, 100), (4, 100), (8, 100), (16, 100), (8, 1024), (16, 1024))
"""(batch, context)"""
DECODE_STEPS = 8
TARGETS_MS = {"decode 1 x 100": 22.0, "decode 4 x 100": 26.0, "decode 16 x 100": 40.0}
PREFILL_TARGET = 1200.0
"""Tokens a second."""

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of one case on one engine, milliseconds."""

    engine: str
    case: str
    median_ms: float
    fastest_ms: float
    cpu_ms: float
    """Median of the processor time: without what other processes took of the core."""
    samples: int


class Diphase:
    """Cases on our engine."""

    def __init__(self, files: ModelFiles, dtype: str) -> None:
        self.name = f"diphase {dtype}"
        self._engine = TorchEngine.load(EngineConfig(dtype=dtype, kv_cache_mib=512), files=files)
        pool = torch.frombuffer(self._engine.kv_regions[0].buffer, dtype=torch.bfloat16)
        pool.normal_(generator=torch.Generator().manual_seed(0))
        self._rng = random.Random(0)

    def prefill(self) -> Step:
        sequence = self._sequence(PREFILL_TOKENS, computed=0)
        plan = StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=PREFILL_TOKENS, samples=True)])
        return lambda: self._engine.execute(plan)

    def decode(self, batch: int, context: int) -> Step:
        sequences = [self._sequence(context, computed=context - 1) for _ in range(batch)]
        plan = StepPlan(chunks=[Chunk(sequence=one, num_tokens=1, samples=True) for one in sequences])
        return lambda: self._engine.execute(plan)

    def answer(self, token_ids: list[int]) -> list[int]:
        tokens = generate(self._engine, [token_ids], SamplingParams(max_tokens=8))[0]
        return [token.token_id for token in tokens]

    def close(self) -> None:
        self._engine.close()

    def _sequence(self, num_tokens: int, computed: int) -> Request:
        """Random tokens over scattered blocks; sequences may share blocks, which changes no timing of
        reads."""
        engine = self._engine
        blocks = self._rng.sample(range(engine.num_blocks), engine.layout.num_blocks_for(num_tokens))
        return Request(
            key=HandoffKey("benchmark", 0),
            gateway_id="",
            token_ids=[self._rng.randrange(engine.limits.vocab_size) for _ in range(num_tokens)],
            num_prompt_tokens=computed or num_tokens,  # a decoding token is no prompt's
            params=SamplingParams(),
            slo=Slo(),
            arrived_at=0.0,
            block_table=blocks,
            num_computed=computed,
        )


class Transformers:
    """The same cases on LlamaForCausalLM, eager attention, greedy."""

    def __init__(self, files: ModelFiles) -> None:
        self.name = "transformers eager bf16"
        config = LlamaConfig(**json.loads(files.config.to_json()), attn_implementation="eager")
        self._model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        self._config = files.config
        read = drawn_tensors(files.config, files.seed, torch.bfloat16) if files.is_dummy else _stored(files)
        with torch.inference_mode():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(read(name))

    def prefill(self) -> Step:
        ids = torch.randint(0, self._config.vocab_size, (1, PREFILL_TOKENS))
        return lambda: self._run(ids, DynamicCache())

    def decode(self, batch: int, context: int) -> Step:
        config = self._config
        ids = torch.randint(0, config.vocab_size, (batch, 1))
        shape = (batch, config.num_kv_heads, context - 1, config.head_dim)
        cache = DynamicCache()
        for layer in range(config.num_layers):
            cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)

        def step() -> None:
            self._run(ids, cache)
            cache.crop(-1)

        return step

    def answer(self, token_ids: list[int]) -> list[int]:
        ids = list(token_ids)
        for _ in range(8):
            ids.append(int(self._run(torch.tensor([ids]), DynamicCache())))
        return ids[len(token_ids) :]

    def close(self) -> None:
        del self._model

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = self._model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(dim=1)


def _stored(files: ModelFiles) -> Callable[[str], torch.Tensor]:
    source = open_weights(files)

    def read(name: str) -> torch.Tensor:
        raw = source.read(name)
        return torch.frombuffer(raw.data, dtype=TORCH_DTYPES[raw.dtype]).view(raw.shape)

    return read


class Contender(Protocol):
    """An engine that takes part."""

    name: str

    def prefill(self) -> Step: ...
    def decode(self, batch: int, context: int) -> Step: ...
    def answer(self, token_ids: list[int]) -> list[int]: ...
    def close(self) -> None: ...


def measure(engines: Sequence[Contender], rounds: int) -> list[Timing]:
    """Every case on every engine in turn, `rounds` times after one that warms up."""
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for engine in engines:
            taken = timed(engine.prefill(), 1)
            samples.setdefault((engine.name, PREFILL), []).extend(taken if number else [])
        for batch, context in DECODE:
            for engine in engines:
                taken = timed(engine.decode(batch, context), DECODE_STEPS)
                case = f"decode {batch} x {context}"
                samples.setdefault((engine.name, case), []).extend(taken if number else [])
        print(f"round {number} of {rounds}", file=sys.stderr)
    return [timing_of(engine, case, times) for (engine, case), times in samples.items()]


def timed(step: Step, repeats: int) -> list[tuple[float, float]]:
    """(wall, processor) seconds of each of `repeats` steps, after one that is not counted."""
    step()
    times = []
    for _ in range(repeats):
        wall, busy = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - wall, time.process_time() - busy))
    return times


def timing_of(engine: str, case: str, times: list[tuple[float, float]]) -> Timing:
    walls, cpus = zip(*times, strict=True)
    return Timing(
        engine=engine,
        case=case,
        median_ms=round(statistics.median(walls) * 1000.0, 2),
        fastest_ms=round(min(walls) * 1000.0, 2),
        cpu_ms=round(statistics.median(cpus) * 1000.0, 2),
        samples=len(times),
    )


def read_floor_ms(files: ModelFiles) -> float:
    """Milliseconds to read the layers' and the head's weights once, in bf16."""
    config = files.config
    heads = config.num_q_heads * 2 + config.num_kv_heads * 2
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    size = config.num_layers * layer + config.vocab_size * config.hidden_size
    buffer = torch.ones(size // 4, dtype=torch.int64)  # eight bytes hold four weights
    times = []
    for _ in range(7):
        started = time.perf_counter()
        buffer.sum()
        times.append((time.perf_counter() - started) * 1000.0)
    return statistics.median(times)


def report(timings: list[Timing]) -> None:
    engines = list(dict.fromkeys(timing.engine for timing in timings))
    by_case = {(timing.engine, timing.case): timing for timing in timings}
    print(f"{'median ms':18}" + "".join(f"{engine:>26}" for engine in engines))
    for case in dict.fromkeys(timing.case for timing in timings):
        base = by_case[engines[-1], case].median_ms
        cells = []
        for engine in engines:
            median = by_case[engine, case].median_ms
            cells.append(f"{median:.1f} ({base / median:.1f} x)")
        target = f"   target {TARGETS_MS[case]:.0f}" if case in TARGETS_MS else ""
        print(f"{case:18}" + "".join(f"{cell:>26}" for cell in cells) + target)
    for engine in engines:
        speed = PREFILL_TOKENS / by_case[engine, PREFILL].median_ms * 1000.0
        print(f"{engine}: prefill {speed:,.0f} tokens/s (target {PREFILL_TARGET:,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/results/engine.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = resolve(options.model)
    engines: list[Contender] = [Diphase(files, "bf16"), Diphase(files, "int8"), Transformers(files)]
    floor_ms = read_floor_ms(files)
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is", in the default model's tokens
    answers = {engine.name: engine.answer(prompt) for engine in engines}
    gc.disable()
    timings = measure(engines, options.rounds)
    report(timings)
    print(f"reading all bf16 weights once: {floor_ms:.1f} ms")
    result = {
        "what": "engine on one thread",
        "model": files.name,
        "amx": torch.cpu._is_amx_tile_supported(),
        "transformers": transformers.__version__,
        "read_all_bf16_weights_ms": round(floor_ms, 2),
        "prefill_tokens_per_s": {
            timing.engine: round(PREFILL_TOKENS / timing.median_ms * 1000.0)
            for timing in timings
            if timing.case == PREFILL
        },
        "greedy_after_the_capital_of_france_is": answers,
        "timings": [asdict(timing) for timing in timings],
    }
    harness.write_result(options.output, result)
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()

"""What each codec saves, costs and spoils, on real KV of the default model.

    .venv/bin/python -P benchmarks/codecs.py [--variants]   # writes docs/results/codecs.json

Texts that ship with Python and with this repository are cut into prompts and their continuations. The engine
computes a prompt's KV; a codec encodes and decodes it; the engine goes on from what came back:

- ratio: KV bytes a payload byte, whole prompts and their first 16, 64 and 256 tokens;
- speed: KV bytes a second of one thread's processor time (what other processes take of the core is left out);
- break-even: the bandwidth below which encode, write and decode, one after the other, beat the bare write;
- greedy output: tokens that equal those after the untouched KV, and where the first differs;
- perplexity of the true continuation, and over its positions the divergence KL(untouched || decoded) and
  how often the likeliest token is the same.

--variants measures alternatives around `cachegen-1`; they are printed and not written.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diphase.benchmarks import harness
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.kv_pool import TORCH_DTYPES
from diphase.engine.sequence import Sequence
from diphase.kv_transfer.codecs import delta_groups
from diphase.kv_transfer.codecs.codec import CODECS, RAW, Codec, KvSpec, load_codec
from diphase.kv_transfer.codecs.codec_cachegen import CacheGenCodec
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo

ROOT = Path(__file__).resolve().parents[1]
TOPICS = ("naming", "typesseq", "formatstrings", "import", "customization", "operator-summary")
PROMPT_TOKENS = 512
CONTINUATION_TOKENS = 96
GREEDY_TOKENS = 48
PROMPTS_A_TEXT = 2
CHUNKS = (16, 64, 256, PROMPT_TOKENS)
"""Tokens of a payload."""
ROUNDS = 5
EVEN = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one thread, MB of KV a second."""

    encode: float
    decode: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    codec: str
    lossless: bool
    ratio: dict[int, float]
    """By tokens of a payload."""
    speed: dict[int, Speed]
    break_even_mb_s: dict[int, float]
    greedy_equal: float
    """Share of tokens that equal the untouched ones at their place."""
    greedy_unchanged: float
    """Share of prompts none of whose tokens differs."""
    greedy_first_difference: float | None
    """Median over the prompts that have one, counted from 0."""
    perplexity: float
    kl_mean: float
    """nats a token."""
    kl_largest: float
    top1_equal: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What the engine says after some KV."""

    greedy: torch.Tensor
    """[num_prompts, GREEDY_TOKENS]"""
    log_probs: torch.Tensor
    """Of the continuation's positions, [CONTINUATION_TOKENS, num_prompts, vocab_size]."""
    nll: float
    """Mean over the continuation, nats."""


def texts() -> Iterator[str]:
    yield (ROOT / "LICENSE").read_text()
    yield (ROOT / "docs/handoff.md").read_text()
    yield inspect.getsource(statistics)
    for topic in TOPICS:
        yield pydoc_data.topics.topics[topic]


class Model:
    """The default model with the KV of all prompts in its pool."""

    def __init__(self) -> None:
        files = resolve("smollm2")
        tokenizer = load_tokenizer(files)
        length = PROMPT_TOKENS + CONTINUATION_TOKENS + 1
        self.name = files.name
        self.prompts: list[list[int]] = []
        for text in texts():
            ids = list(tokenizer.encode(text, add_special=False))
            cuts = range(0, min(len(ids) // length, PROMPTS_A_TEXT) * length, length)
            self.prompts += [ids[cut : cut + length] for cut in cuts]
        blocks_each = -(-length // 16)
        self._engine = TorchEngine.load(EngineConfig(kv_cache_mib=384), files=files)
        self.layout = self._engine.layout
        if blocks_each * len(self.prompts) > self._engine.num_blocks:
            raise SystemExit(f"{len(self.prompts)} prompts do not fit the pool")
        dtype = TORCH_DTYPES[self.layout.dtype]
        [region] = self._engine.kv_regions
        self._pool = torch.frombuffer(region.buffer, dtype=dtype).view(self._engine.num_blocks, -1)
        self._tables = [
            list(range(first, first + blocks_each))
            for first in range(0, blocks_each * len(self.prompts), blocks_each)
        ]
        self.kv = [
            self._prefill(prompt, table) for prompt, table in zip(self.prompts, self._tables, strict=True)
        ]

    def _prefill(self, prompt: list[int], table: list[int]) -> memoryview:
        sequence = self._sequence(prompt[:PROMPT_TOKENS], table, 0)
        self._engine.logits(
            StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=PROMPT_TOKENS, samples=True)])
        )
        blocks = table[: self.layout.num_blocks_for(PROMPT_TOKENS)]
        return memoryview(bytearray(self._pool[blocks].view(torch.uint8).numpy().tobytes()))

    def answers(self, kv: list[memoryview]) -> Answers:
        """What follows after the prompts, with this KV of theirs."""
        self._fill(kv)
        sequences = self._after_prompts()
        greedy = []
        for _ in range(GREEDY_TOKENS):
            best = self._step(sequences).argmax(-1)
            greedy.append(best)
            self._append(sequences, best.tolist())
        self._fill(kv)
        sequences = self._after_prompts()
        log_probs, nll = [], 0.0
        for i in range(CONTINUATION_TOKENS):
            truth = [prompt[PROMPT_TOKENS + 1 + i] for prompt in self.prompts]
            log_probs.append(torch.log_softmax(self._step(sequences), -1))
            nll -= float(log_probs[-1][range(len(truth)), truth].mean())
            self._append(sequences, truth)
        return Answers(torch.stack(greedy, 1), torch.stack(log_probs), nll / CONTINUATION_TOKENS)

    def _fill(self, kv: list[memoryview]) -> None:
        for table, each in zip(self._tables, kv, strict=True):
            blocks = torch.frombuffer(each, dtype=self._pool.dtype).view(-1, self._pool.shape[1])
            self._pool[table[: len(blocks)]] = blocks

    def _after_prompts(self) -> list[Sequence]:
        """Decoding sequences: the token after the prompt is there, as the prefill side has sampled it."""
        return [
            self._sequence(prompt[: PROMPT_TOKENS + 1], table, PROMPT_TOKENS)
            for prompt, table in zip(self.prompts, self._tables, strict=True)
        ]

    def _step(self, sequences: list[Sequence]) -> torch.Tensor:
        chunks = [Chunk(sequence=sequence, num_tokens=1, samples=True) for sequence in sequences]
        return self._engine.logits(StepPlan(chunks=chunks)).float()

    def _append(self, sequences: list[Sequence], token_ids: list[int]) -> None:
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.num_computed += 1
            sequence.token_ids.append(token_id)

    def _sequence(self, token_ids: list[int], table: list[int], num_computed: int) -> Sequence:
        return Sequence(
            key=HandoffKey("benchmark", 0),
            gateway_id="",
            token_ids=list(token_ids),
            num_prompt_tokens=min(len(token_ids), PROMPT_TOKENS),
            params=SamplingParams(),
            slo=Slo(),
            arrived_at=0.0,
            block_table=table,
            num_computed=num_computed,
        )

    def spec(self, num_tokens: int) -> KvSpec:
        return KvSpec(
            layout=self.layout,
            num_blocks=self.layout.num_blocks_for(num_tokens),
            num_tokens=num_tokens,
            first_layer=0,
            num_layers=self.layout.num_layers,
        )


def round_trip(codec: Codec, kv: memoryview, spec: KvSpec) -> tuple[memoryview, int]:
    """KV that went through the codec, and the bytes of its payload."""
    out = memoryview(bytearray(codec.max_bytes(spec)))
    length = codec.encode(kv[: spec.size_bytes], spec, out)
    back = memoryview(bytearray(spec.size_bytes))
    codec.decode(out[:length], spec, back)
    return back, length


def mean_ratio(model: Model, codec: Codec, num_tokens: int) -> float:
    spec = model.spec(num_tokens)
    lengths = [round_trip(codec, kv, spec)[1] for kv in model.kv]
    return round(spec.size_bytes * len(lengths) / sum(lengths), 3)


def speed(model: Model, codec: Codec, num_tokens: int) -> Speed:
    """The fastest of some rounds over several prompts."""
    spec = model.spec(num_tokens)
    out, back = memoryview(bytearray(codec.max_bytes(spec))), memoryview(bytearray(spec.size_bytes))
    encode, decode = [], []
    for kv in model.kv[:ROUNDS] * 2:
        began = time.thread_time()
        length = codec.encode(kv[: spec.size_bytes], spec, out)
        between = time.thread_time()
        codec.decode(out[:length], spec, back)
        encode.append(between - began)
        decode.append(time.thread_time() - between)
    megabytes = spec.size_bytes / 1e6
    return Speed(encode=round(megabytes / min(encode), 1), decode=round(megabytes / min(decode), 1))


def measure(model: Model, codec: Codec, untouched: Answers) -> Result:
    ratio = {tokens: mean_ratio(model, codec, tokens) for tokens in CHUNKS}
    speeds = {tokens: speed(model, codec, tokens) for tokens in CHUNKS}
    spec = model.spec(PROMPT_TOKENS)
    answers = model.answers([round_trip(codec, kv, spec)[0] for kv in model.kv])
    same = answers.greedy == untouched.greedy
    first = [int((~row).nonzero()[0]) for row in same if not bool(row.all())]
    divergence = (untouched.log_probs.exp() * (untouched.log_probs - answers.log_probs)).sum(-1)
    top1 = answers.log_probs.argmax(-1) == untouched.log_probs.argmax(-1)
    return Result(
        codec=codec.name,
        lossless=codec.lossless,
        ratio=ratio,
        speed=speeds,
        break_even_mb_s={
            tokens: round(max(1 - 1 / ratio[tokens], 0.0) / (1 / each.encode + 1 / each.decode), 1)
            for tokens, each in speeds.items()
        },
        greedy_equal=round(float(same.float().mean()), 4),
        greedy_unchanged=round(float(same.all(1).float().mean()), 4),
        greedy_first_difference=statistics.median(first) if first else None,
        perplexity=round(float(torch.tensor(answers.nll).exp()), 4),
        kl_mean=round(float(divergence.mean()), 6),
        kl_largest=round(float(divergence.max()), 4),
        top1_equal=round(float(top1.float().mean()), 4),
    )


def show(result: Result) -> None:
    one = result.speed[PROMPT_TOKENS]
    ratios = " ".join(f"{value:5.2f}" for value in result.ratio.values())
    print(f"{result.codec:20} ratio {ratios}  encode {one.encode:6.0f} decode {one.decode:6.0f} MB/s", end="")
    print(f"  pays below {result.break_even_mb_s[PROMPT_TOKENS]:5.1f} MB/s", end="")
    print(f"  greedy {result.greedy_equal:.3f} whole {result.greedy_unchanged:.2f}", end="")
    print(f" first {result.greedy_first_difference}  perplexity {result.perplexity:.3f}", end="")
    print(f"  KL {result.kl_mean:.5f} to {result.kl_largest:.3f} top-1 {result.top1_equal:.3f}", flush=True)


@contextmanager
def constant(name: str, value: Any) -> Iterator[None]:
    """The quantiser with another constant."""
    before = getattr(delta_groups, name)
    setattr(delta_groups, name, value)
    try:
        yield
    finally:
        setattr(delta_groups, name, before)


def measure_variants(model: Model, untouched: Answers) -> None:
    ones = (1.0, 1.0, 1.0)
    show(measure(model, CacheGenCodec("thirds alike", EVEN, ones), untouched))
    with constant("NUM_SHIFTS", 1):
        show(measure(model, CacheGenCodec("no shifts", EVEN, ones), untouched))
    with constant("_ANCHOR_SHIFT", 0):
        show(measure(model, CacheGenCodec("anchors as the others", EVEN, ones), untouched))
    with constant("_ANCHOR_SHIFT", 3):
        show(measure(model, CacheGenCodec("anchors 8 x finer", EVEN, ones), untouched))
    early, late = (0.35, 0.5, 0.7), (0.7, 0.5, 0.35)
    show(measure(model, CacheGenCodec("early layers finer", early, (0.7, 1.0, 1.4)), untouched))
    show(measure(model, CacheGenCodec("late layers finer", late, (1.4, 1.0, 0.7)), untouched))
    show(measure(model, CacheGenCodec("K and V alike", (0.7, 0.7, 0.7), (0.7, 0.7, 0.7)), untouched))
    show(measure(model, CacheGenCodec("V finer than K", ones, EVEN), untouched))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/codecs.json"))
    parser.add_argument(
        "--variants", action="store_true", help="measure alternatives instead; writes nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model()
    untouched = model.answers(model.kv)
    print(f"{len(model.prompts)} prompts of {PROMPT_TOKENS} tokens of {model.name}", flush=True)
    if options.variants:
        measure_variants(model, untouched)
        return
    results = []
    for name in sorted(CODECS, key=lambda name: name != RAW):
        results.append(measure(model, load_codec(name), untouched))
        show(results[-1])
    document = {
        "what": "wire codecs on real KV: ratio, speed of one thread, change of output",
        "model": model.name,
        "dtype": model.layout.dtype,
        "prompts": len(model.prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "greedy_tokens": GREEDY_TOKENS,
        "continuation_tokens": CONTINUATION_TOKENS,
        "results": [asdict(result) for result in results],
    }
    harness.write_result(options.output, document)


if __name__ == "__main__":
    main()

"""The real engine: a Llama model on torch behind the seam of base.py. One for every role."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch

from ..checkpoints.lookup import resolve
from ..checkpoints.model_files import ModelFiles, Progress
from ..proto.clock import Clock, MonotonicClock
from ..proto.errors import DiphaseError, WorkerLost
from ..proto.ids import HandoffKey
from ..proto.sampling import SamplingParams
from ..proto.slo import Slo
from .base import Chunk, KvRegion, LayerHook, ModelLimits, SampledToken, StepPlan, StepResult
from .config import EngineConfig
from .kv_pool import KvPool
from .model_runner import ModelRunner
from .rank_group import RankGroup
from .ranks import ALONE, GlooRanks, Ranks
from .sampler import sample
from .sequence import Sequence
from .shard import load_shard
from .tensor_parallel import layout_of, num_blocks_of, sharding_of

_WARM_UP_TOKENS = (512, 1)


class TorchEngine:
    """Implements Engine. Made by `load`; used by one thread at a time, whichever it is."""

    def __init__(
        self, files: ModelFiles, config: EngineConfig, clock: Clock, progress: Progress | None
    ) -> None:
        self._clock = clock
        self.layout = layout_of(files, config)
        self.sharding = sharding_of(files, config)
        self.num_blocks = num_blocks_of(self.layout, self.sharding, config)
        self.limits = ModelLimits(
            name=files.name,
            # What does not fit the pool could never run.
            context_length=min(files.config.context_length, self.num_blocks * config.block_size),
            vocab_size=files.config.vocab_size,
            eos_token_ids=files.config.eos_token_ids,
        )
        self._other_regions: list[KvRegion] = []
        self._group = RankGroup(config, files.fingerprint) if self.sharding.num_ranks > 1 else None
        try:
            shard = load_shard(files, config, 0, partial(self._connect, config), progress)
        except BaseException:
            if self._group is not None:
                self._group.close()
            raise
        self._pool = shard.pool
        self._runner: ModelRunner | None = ModelRunner(
            shard.model,
            config.block_size,
            batch_invariant=config.batch_invariant,
            announce=self._group.announce if self._group is not None else None,
        )

    def _connect(self, config: EngineConfig, _pool: KvPool) -> Ranks:
        """Waits for the other ranks, if there are any."""
        if self._group is None:
            return ALONE
        sizes = [
            self.num_blocks * self.sharding.rank_layout(self.layout, rank).block_bytes
            for rank in range(1, self.sharding.num_ranks)
        ]
        self._other_regions = self._group.wait_loaded(sizes)
        return GlooRanks(
            0, self.sharding.num_ranks, store_path=self._group.store_path, timeout_s=config.rank_timeout_s
        )

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        *,
        files: ModelFiles | None = None,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ) -> TorchEngine:
        """Resolves the model (unless `files` are given), loads it and runs two steps, so that the first
        request does not pay for what torch prepares on first use. Blocks for seconds. Sets torch's thread
        count.

        Raises:
            CheckpointError: the model cannot be found or read.
            ConfigError: the KV pool does not fit the machine.
        """
        files = files or resolve(config.model, progress=progress)
        engine = cls(files, config, clock or MonotonicClock(), progress)
        if progress is not None:
            progress("warming up", 0.0)
        engine._warm_up()
        if progress is not None:
            progress("warming up", 1.0)
        return engine

    @property
    def kv_regions(self) -> list[KvRegion]:
        if self._runner is None:
            return []
        return [KvRegion(buffer=self._pool.buffer, fd=self._pool.fd), *self._other_regions]

    def execute(self, plan: StepPlan, on_layer: LayerHook | None = None) -> StepResult:
        started = self._clock.now()
        with torch.inference_mode():
            logits = self.logits(plan, on_layer)
            sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
            sampled = iter(sample(logits, sampling, self.limits.eos_token_ids))
        tokens: list[SampledToken | None] = [
            next(sampled) if chunk.samples else None for chunk in plan.chunks
        ]
        return StepResult(tokens=tokens, duration_s=self._clock.now() - started)

    def logits(self, plan: StepPlan, on_layer: LayerHook | None = None) -> torch.Tensor:
        """A step without sampling: the logits of its sampling chunks, [num_sampling_chunks, vocab_size]."""
        if self._runner is None:
            raise RuntimeError("the engine is closed")
        with torch.inference_mode():
            if self._group is None:
                return self._runner.run(plan, on_layer)
            try:
                logits = self._runner.run(plan, on_layer)
            except WorkerLost as error:
                raise self._group.reason(error) from error
            self._group.step_done()
            return logits

    def watch(self, lost: Callable[[DiphaseError], None]) -> None:
        if self._group is not None:
            self._group.watch(lost)

    def close(self) -> None:
        if self._runner is None:
            return
        self._runner = None
        if self._group is not None:
            self._group.close()
        for region in self._other_regions:
            if region.fd is not None:
                os.close(region.fd)
        self._other_regions = []
        self._pool.close()

    def _warm_up(self) -> None:
        """One long prompt and one token in block 0 on, which nobody owns yet."""
        for wanted in _WARM_UP_TOKENS:
            length = min(wanted, self.limits.context_length - 1)
            sequence = Sequence(
                key=HandoffKey("warm-up", 0),
                gateway_id="",
                token_ids=[0] * length,
                num_prompt_tokens=length,
                params=SamplingParams(),
                slo=Slo(),
                arrived_at=0.0,
                block_table=list(range(self.layout.num_blocks_for(length))),
            )
            self.execute(StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=length, samples=True)]))

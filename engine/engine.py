"""The real engine: a Llama model on torch behind the seam of base.py. One for every role."""

from __future__ import annotations

import torch

from ..checkpoints.lookup import resolve
from ..checkpoints.model_files import ModelFiles, Progress
from ..kernels.registry import kernels_for
from ..proto.clock import Clock, MonotonicClock
from ..proto.ids import HandoffKey
from ..proto.kv_layout import KvLayout
from ..proto.sampling import SamplingParams
from ..proto.slo import Slo
from .base import Chunk, LayerHook, ModelLimits, SampledToken, StepPlan, StepResult
from .config import EngineConfig
from .kv_pool import TORCH_DTYPES, KvPool
from .llama import Llama
from .model_runner import ModelRunner
from .sampler import sample
from .sequence import Sequence
from .weights import load_weights

_WARM_UP_TOKENS = (512, 1)


class TorchEngine:
    """Implements Engine. Made by `load`; used by one thread at a time, whichever it is."""

    def __init__(
        self, files: ModelFiles, config: EngineConfig, clock: Clock, progress: Progress | None
    ) -> None:
        torch.set_num_threads(config.threads)
        model = files.config
        self._clock = clock
        self.layout = KvLayout(
            model=f"{files.name}:{files.fingerprint}:{config.dtype}",
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=config.block_size,
            dtype=config.activation_dtype,
        )
        self._pool = KvPool(self.layout, (config.kv_cache_mib << 20) // self.layout.block_bytes)
        self.num_blocks = self._pool.num_blocks
        self.limits = ModelLimits(
            name=files.name,
            # What does not fit the pool could never run.
            context_length=min(model.context_length, self.num_blocks * config.block_size),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )
        kernels = kernels_for("cpu")
        with torch.inference_mode():
            weights = load_weights(
                files,
                kernels,
                dtype=TORCH_DTYPES[config.activation_dtype],
                quantised=config.dtype == "int8",
                progress=progress,
            )
            llama = Llama(model, weights, kernels, self._pool.tensor, self.limits.context_length)
        self._runner: ModelRunner | None = ModelRunner(
            llama, config.block_size, batch_invariant=config.batch_invariant
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
    def kv_buffer(self) -> memoryview:
        return self._pool.buffer

    @property
    def kv_fd(self) -> int | None:
        return self._pool.fd

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
            return self._runner.run(plan, on_layer)

    def close(self) -> None:
        self._runner = None
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

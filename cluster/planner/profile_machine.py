"""A machine of the planner that was profiled: CPU workers as `diphase serve` starts them. Knows no pools."""

from __future__ import annotations

from ...proto.errors import ConfigError
from ...router.step_time import StepTime
from .hardware import MOST, Node
from .machines import Limits, Parallel
from .profile import KINDS, Profile, ServingCost


class ProfileMachine:
    """Workers as `diphase profile` measured one: of one process, each in a slot, which counts as a GPU.

    While a worker computes, all other slots of its machine are taken to compute, too: at its goodput a
    cluster is busy, and how busy each worker is only a simulation of one placement would say.
    """

    parallel = Parallel()
    num_layers = 1
    """There are no pipelines, and hand-offs are planned as if all went whole, which takes prompts of
    kv_transfer.layerwise_tokens and more for a little slower than they are."""

    def __init__(self, profile: Profile, slots: int) -> None:
        """
        Args:
            slots: that a plan may use; as many of them as the profiled machine has cores for are on one.

        Raises:
            ConfigError: the profile does not say what serving and hand-offs cost.
        """
        engine, serving = profile.engine, profile.serving
        if serving == ServingCost():
            raise ConfigError(
                f"the profile of {engine.model} does not say what serving and hand-offs cost; make one with "
                "`diphase profile` and without --engine-only"
            )
        self.profile = profile
        here = profile.machine.get("machine", {})
        on_one = max(1, here.get("cores", slots * engine.threads) // engine.threads)
        link = min(serving.handoff_bytes_per_s / 1e9, MOST)  # infinite where bytes took no time
        self.hardware = Node(
            name=f"{here.get('cpu', 'unnamed CPU')}, a slot is {engine.threads} of its cores",
            intra_node_gb_per_s=link,
            inter_node_gb_per_s=link,
            gpus_per_node=on_one,
            link_share=1.0,
            handoff_s=serving.handoff_s,
        )
        # No larger steps than were measured.
        self.limits = Limits(
            block_size=engine.block_size,
            chunk_budget=max(cell.shape.prefill_tokens for cell in profile.cells),
            max_running=max(cell.shape.decode_batch for cell in profile.cells),
            context_length=engine.context_length,
        )
        neighbours = max(0, min(slots, on_one) - 1)
        beside = serving.first_token_beside_s if neighbours else 0.0
        self.first_token_s = max(serving.first_token_s, beside)
        prefill, decode = (
            1.0 + (max(profile.slowdown.factors[own].values()) - 1.0) * neighbours for own in KINDS
        )
        self._step_time = profile.step_time.slowed(prefill, decode).plus(
            serving.step_s, serving.step_per_sequence_s
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        return self.profile.engine.block_bytes // self.profile.engine.block_size

    def parallels(self, gpus: int, max_pp: int) -> list[Parallel]:
        """See Machine."""
        return [self.parallel]

    def step_time(self, parallel: Parallel) -> StepTime:
        """See Machine."""
        self._check(parallel)
        return self._step_time

    def kv_tokens(self, parallel: Parallel) -> int:
        """See Machine."""
        self._check(parallel)
        return self.profile.engine.num_blocks * self.profile.engine.block_size

    def _check(self, parallel: Parallel) -> None:
        if parallel != self.parallel:
            raise ConfigError(f"profiles are of workers of one process, not of {parallel}; plan with tp 1")

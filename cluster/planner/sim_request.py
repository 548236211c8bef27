"""A request on its way through the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from ...engine.sequence import Sequence
from ...proto.ids import HandoffKey
from ...proto.sampling import SamplingParams
from ...proto.slo import Slo
from .events import NS


@dataclass(slots=True, eq=False, kw_only=True)
class SimRequest:
    """What is known of it, and its record: nanoseconds since the start, -1 while they have not come."""

    index: int
    arrival: int
    prompt_tokens: int
    output_tokens: int
    hashes: list[bytes]
    """Of its prompt's full blocks; may be fewer, or none where nothing is shared."""
    prefill_worker: int = -1
    decode_worker: int = -1
    scheduled: int = -1
    """The first step with a part of its prompt began."""
    token0: int = -1
    verified: int = -1
    """Its hand-off was complete."""
    joined: int = -1
    """The step of its second token began."""
    last_token: int = -1
    cached_tokens: int = 0
    rejected: bool = False

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(f"{self.index:08d}", 0)


@lru_cache(maxsize=4096)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def sequence_of(request: SimRequest, slo: Slo, generated: int = 0) -> Sequence:
    """The request as a scheduler sees it, with so many tokens generated and nothing computed."""
    return Sequence(
        key=request.key,
        gateway_id="",
        # Schedulers count tokens, append and look at the last one: a byte for each does.
        token_ids=cast("list[int]", bytearray(request.prompt_tokens + generated)),
        num_prompt_tokens=request.prompt_tokens,
        params=_params(request.output_tokens),
        slo=slo,
        arrived_at=request.arrival / NS,
        block_hashes=list(request.hashes),
    )

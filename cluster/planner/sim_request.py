"""A request on its way through the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from ...engine.sequence import Sequence
from ...proto.errors import Overloaded, PromptTooLong, SloInfeasible
from ...proto.ids import HandoffKey
from ...proto.sampling import SamplingParams
from ...proto.slo import Slo
from .events import NS

REFUSALS = frozenset(error.code for error in (Overloaded, SloInfeasible, PromptTooLong))


@dataclass(slots=True, eq=False, kw_only=True)
class SimRequest:
    """What is known of it, and its record: nanoseconds since the start, -1 while they have not come."""

    index: int
    arrival: int
    prompt_tokens: int
    output_tokens: int
    hashes: list[bytes]
    """Of its prompt's full blocks; may be fewer, or none where nothing is shared."""
    max_tokens: int | None = None
    """The most that its client allows: all that a router knows of its length. None: just what comes, as
    `diphase bench` asks for. Traces do not have it, so a policy that reserves for it (splitwise) knows more
    of a trace's requests in simulation than it would of their clients'."""
    prefill_worker: int = -1
    """Of the last attempt, as what follows apart from `scheduled`, `token0` and `cached_tokens`."""
    decode_worker: int = -1
    scheduled: int = -1
    """The first step with a part of its prompt began."""
    token0: int = -1
    verified: int = -1
    """Its hand-off was complete."""
    joined: int = -1
    """The step of the first token after its hand-off began."""
    last_token: int = -1
    cached_tokens: int = 0
    attempts: int = 0
    """That were placed."""
    interrupted: int = -1
    """It lost a worker then, and no token came since."""
    stall: int = 0
    """Longest time from the loss of a worker to the next token."""
    truncated: bool = False
    """A worker ended it before its last token, for want of context: it was served, but not as it asked."""
    error: str = ""
    """Code (`proto/errors.py`) of what ended it before its last token."""

    @property
    def request_id(self) -> str:
        return f"{self.index:08d}"

    @property
    def rejected(self) -> bool:
        """It was too much for the cluster, or too long for a worker: nothing was lost."""
        return self.error in REFUSALS


@lru_cache(maxsize=4096)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def sequence_of(request: SimRequest, slo: Slo, attempt: int = 0, generated: int = 0) -> Sequence:
    """The request as a scheduler sees it, with so many tokens generated and nothing computed."""
    return Sequence(
        key=HandoffKey(request.request_id, attempt),
        gateway_id="",
        # Schedulers count tokens, append and look at the last one: a byte for each does.
        token_ids=cast("list[int]", bytearray(request.prompt_tokens + generated)),
        num_prompt_tokens=request.prompt_tokens,
        params=_params(request.output_tokens),
        slo=slo,
        arrived_at=request.arrival / NS,
        block_hashes=list(request.hashes),
    )

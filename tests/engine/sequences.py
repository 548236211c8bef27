"""Sequences and submits for tests of schedulers and roles."""

from __future__ import annotations

from diphase.engine.sequence import Sequence
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams, sampling_to_proto
from diphase.proto.slo import Priority, Slo, slo_to_proto
from diphase.proto.worker_pb2 import PeerAddress, Submit


def make_sequence(
    name: str,
    prompt: list[int] | int,
    *,
    max_tokens: int = 8,
    priority: Priority = Priority.STANDARD,
    arrived_at: float = 0.0,
    **sampling: object,
) -> Sequence:
    """`prompt` is the ids, or how many to make up from the name."""
    token_ids = made_up_prompt(name, prompt) if isinstance(prompt, int) else list(prompt)
    return Sequence(
        key=HandoffKey(name, 0),
        gateway_id="g",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling),  # type: ignore[arg-type]
        slo=Slo(priority=priority),
        arrived_at=arrived_at,
    )


def made_up_prompt(name: str, length: int) -> list[int]:
    seed = sum(name.encode()) * 7919
    return [(seed + i * i * 31 + i * 7) % 900 + 5 for i in range(length)]


def make_submit(
    request_id: str,
    prompt: list[int],
    *,
    attempt: int = 0,
    emitted: list[int] | None = None,
    decode: PeerAddress | None = None,
    slo: Slo | None = None,
    **sampling: object,
) -> Submit:
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Submit(
        request_id=request_id,
        attempt=attempt,
        prompt_token_ids=prompt,
        emitted_token_ids=emitted or [],
        sampling=sampling_to_proto(params),
        slo=slo_to_proto(slo or Slo()),
        decode=decode,
    )

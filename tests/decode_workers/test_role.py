"""What the decode role makes of verified hand-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from diphase.decode_workers.config import DecodeSchedulerConfig
from diphase.decode_workers.role import DecodeRole
from diphase.decode_workers.scheduler import DecodeScheduler
from diphase.engine.block_manager import BlockManager
from diphase.engine.block_tables import BlockTables
from diphase.engine.fake import FakeEngine
from diphase.kv_transfer.events import Ready, ReceiverEvent
from diphase.proto.ids import HandoffKey
from diphase.proto.worker_pb2 import SequenceOutput

from ..engine.sequences import made_up_prompt, make_submit

PROMPT = 31
"""Two blocks hold it and the first token; the token after the next needs a third."""


class FakeReceiver:
    """Hands over whatever the test has."""

    reserved_blocks = in_flight = 0

    def __init__(self, hand_over: Callable[[ReceiverEvent], None]) -> None:
        self.hand_over = hand_over

    def start(self, broken: object) -> None: ...

    def room_freed(self) -> None: ...


class FakeShell:
    """A host that takes everything."""

    def __init__(self) -> None:
        self.handoffs: list[tuple[float, float]] = []
        self.emitted: list[SequenceOutput] = []

    def wake(self) -> None: ...

    def broken(self, error: Exception) -> None: ...

    def adopt(self, submit: object, token_ids: object = (), logprobs: object = ()) -> bool:
        return True

    def emit(self, outputs: Sequence[SequenceOutput]) -> None:
        self.emitted += outputs

    def handed_off(self, seconds: float, tail_s: float, num_bytes: int, num_segments: int) -> None:
        self.handoffs.append((seconds, tail_s))


class Bench:
    """A decode role with a fake engine."""

    def __init__(self, num_blocks: int, max_running: int) -> None:
        self.engine = FakeEngine(num_blocks=num_blocks)
        self.blocks = BlockManager(num_blocks, 16)
        self.shell = FakeShell()
        config = DecodeSchedulerConfig(max_running=max_running)
        self.role = DecodeRole(
            kind="decode",
            scheduler=DecodeScheduler(config, BlockTables(self.blocks, b"root"), self.engine.limits),
            blocks=self.blocks,
            limits=self.engine.limits,
            open_receiver=self._open_receiver,
        )
        self.role.start(self.shell)  # type: ignore[arg-type]

    def _open_receiver(self, pool: object, events: Callable[[ReceiverEvent], None]) -> Any:
        self.receiver = FakeReceiver(events)
        return self.receiver

    def hand_off(
        self, name: str, *, elapsed_s: float, reserved_at: float, verified_at: float, token_id: int = 7
    ) -> None:
        submit = make_submit(name, made_up_prompt(name, PROMPT), max_tokens=40)
        submit.elapsed_s = elapsed_s
        self.receiver.hand_over(
            Ready(
                key=HandoffKey(name, 0),
                submit=submit,
                block_ids=self.blocks.allocate(2),
                num_tokens=PROMPT,
                cached_tokens=0,
                token_id=token_id,
                logprobs=None,
                token_at=0.0,
                reserved_at=reserved_at,
                granted_at=reserved_at + 0.25,
                completed_at=verified_at - 0.5,
                verified_at=verified_at,
                num_bytes=1,
                num_segments=1,
            )
        )

    def step(self, now: float) -> Sequence[str]:
        """Ids of the requests that the step runs."""
        plan = self.role.plan(now)
        assert plan is not None
        self.role.complete(plan, self.engine.execute(plan), now)
        return [chunk.sequence.key.request_id for chunk in plan.chunks]


@pytest.fixture
def make() -> Callable[[int, int], Bench]:
    """(num_blocks, max_running) -> a role that took a long prompt, and a short one that came after it and was
    verified before it."""

    def bench(num_blocks: int, max_running: int) -> Bench:
        bench = Bench(num_blocks, max_running)
        bench.hand_off("short", elapsed_s=0.1, reserved_at=4.0, verified_at=5.0)
        bench.hand_off("long", elapsed_s=0.1, reserved_at=1.0, verified_at=9.0)
        return bench

    return bench


def test_who_came_to_the_gateway_first_runs_first_however_long_its_prompt(
    make: Callable[[int, int], Bench],
) -> None:
    assert make(8, 1).step(9.0) == ["long"]


def test_who_came_to_the_gateway_last_is_preempted(make: Callable[[int, int], Bench]) -> None:
    bench = make(5, 2)
    assert sorted(bench.step(9.0)) == ["long", "short"]
    assert bench.step(9.1) == ["long"]
    assert bench.role.load().preemptions == 1


def test_a_hand_off_is_timed_from_its_grant_and_from_the_prefill_sides_last_word(
    make: Callable[[int, int], Bench],
) -> None:
    assert make(8, 2).shell.handoffs == [(0.75, 0.5), (7.75, 0.5)]


def test_a_first_token_that_is_not_in_the_vocabulary_ends_its_own_request_only(
    make: Callable[[int, int], Bench],
) -> None:
    bench = make(8, 3)
    free = bench.blocks.counts().free
    bench.hand_off("odd", elapsed_s=0.1, reserved_at=1.0, verified_at=9.0, token_id=2**32 - 1)
    [output] = bench.shell.emitted
    assert output.request_id == "odd"
    assert "token id 4294967295 came with the hand-off" in output.terminal.error.message
    assert bench.blocks.counts().free == free
    assert sorted(bench.step(9.0)) == ["long", "short"]

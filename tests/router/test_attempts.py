"""Dispatcher: outputs by (attempt, index), written out by hand. The fake workers stay silent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2 as wpb
from diphase.router.active_request import ActiveRequest
from diphase.router.gateway import Router
from diphase.router.generation import Generation

from ..simulation.virtual_loop import run_virtually
from .fake_workers import FIRST_WORD
from .fakes import FakeCluster, Outcome, fake_cluster, read, start_generation, token_request

WORDS = [FIRST_WORD + i for i in range(10)]


class Scene:
    """One request that was placed on p0 and d0 and hears only what the test says."""

    def __init__(self, cluster: FakeCluster, router: Router, generation: Generation) -> None:
        self.cluster = cluster
        self.router = router
        self.generation = generation
        self.active: ActiveRequest = generation._stream.active

    def say(
        self, worker: str, attempt: int, index: int, tokens: list[int], terminal: wpb.Terminal | None = None
    ) -> None:
        handle = self.router.pool.get(worker)
        assert handle is not None
        output = wpb.SequenceOutput(
            request_id=self.active.request_id,
            attempt=attempt,
            index=index,
            token_ids=tokens,
            terminal=terminal,
        )
        self.router.dispatcher.outputs(handle, [output])

    async def end(self, outcome: Outcome | None = None) -> Outcome:
        outcome = await read(self.generation, outcome or Outcome())
        self.generation.close()
        await asyncio.sleep(0.2)
        return outcome


def play(body: Callable[[Scene], Awaitable[None]], decode: int = 1, **sampling: object) -> None:
    async def main() -> None:
        with fake_cluster(decode=decode, prompt_s=1e6, step_s=1e6) as cluster:
            async with cluster.router() as router:
                wanted = pb.Sampling(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]
                message = token_request(range(100), request_id="r", sampling=wanted)
                generation = await start_generation(router, message)
                await asyncio.sleep(0.01)
                await body(Scene(cluster, router, generation))

    run_virtually(main())


def failed(code: str = "transfer") -> wpb.Terminal:
    return wpb.Terminal(error=wpb.WireError(code=code, message="broke", retryable=True))


DONE = wpb.Terminal(finish_reason=pb.FINISH_REASON_LENGTH)


def test_a_terminal_waits_for_the_tokens_before_it() -> None:
    async def body(scene: Scene) -> None:
        scene.say("d0", 0, 1, WORDS[1:4], DONE)
        assert not scene.active.ended
        scene.say("p0", 0, 0, WORDS[:1])
        assert scene.active.ended
        outcome = await scene.end()
        assert outcome.token_ids == WORDS[:4]

    play(body)


def test_the_failure_of_an_attempt_that_is_over_changes_nothing() -> None:
    async def body(scene: Scene) -> None:
        scene.say("p0", 0, 0, [], failed())
        await asyncio.sleep(0.01)
        assert scene.active.attempt == 1
        scene.say("p0", 0, 0, [], failed())
        scene.say("d0", 0, 0, [], failed())
        assert scene.active.attempt == 1
        scene.say("p0", 0, 0, [999])  # nor do its tokens count
        assert scene.active.token_ids == []
        scene.say("p0", 1, 0, WORDS[:4], DONE)
        assert (await scene.end()).token_ids == WORDS[:4]

    play(body)


def test_outputs_of_a_worker_without_the_attempt_are_refused() -> None:
    async def body(scene: Scene) -> None:
        scene.say("d1", 0, 0, [999])
        await asyncio.sleep(0.01)
        assert scene.active.token_ids == []
        [cancel] = scene.cluster.workers["d1"].cancels
        assert cancel.request_id == scene.active.request_id

    play(body, decode=2)


def test_what_came_ahead_of_a_gap_dies_with_its_attempt() -> None:
    async def body(scene: Scene) -> None:
        scene.say("d0", 0, 1, [998, 999])
        scene.say("d0", 0, 3, [], failed())
        assert scene.active.attempt == 1
        scene.say("p0", 1, 0, WORDS[:1])
        assert scene.active.token_ids == WORDS[:1]

    play(body)


def test_losing_prefill_before_token_0_came_ends_the_attempt_even_while_decode_speaks() -> None:
    async def body(scene: Scene) -> None:
        scene.say("d0", 0, 1, WORDS[1:2])
        scene.cluster.workers["p0"].kill()
        await asyncio.sleep(0.01)
        assert scene.active.attempt == 1

    play(body)


def test_a_late_failure_of_prefill_does_not_end_what_decode_goes_on_with() -> None:
    async def body(scene: Scene) -> None:
        scene.say("p0", 0, 0, WORDS[:1])
        scene.say("d0", 0, 1, WORDS[1:2])
        scene.say("p0", 0, 1, [], failed())
        assert scene.active.attempt == 0
        scene.say("d0", 0, 2, WORDS[2:4], DONE)
        assert (await scene.end()).token_ids == WORDS[:4]

    play(body)


def test_a_failed_attempt_is_cancelled_on_both_sides() -> None:
    async def body(scene: Scene) -> None:
        scene.say("p0", 0, 0, WORDS[:1])
        scene.say("d0", 0, 1, [], failed())
        await asyncio.sleep(0.01)
        for worker in scene.cluster.workers.values():
            [cancel] = worker.cancels
            assert (cancel.request_id, cancel.attempt) == (scene.active.request_id, 0)

    play(body)


def test_a_worker_that_gives_up_is_retried() -> None:
    async def body(scene: Scene) -> None:
        scene.say("p0", 0, 0, [], wpb.Terminal(cancelled=True))
        assert scene.active.attempt == 1
        assert not scene.active.ended

    play(body)


@pytest.mark.parametrize("drains", [True, False])
def test_a_drain_that_is_known_costs_no_attempt_whoever_was_blamed_before(drains: bool) -> None:
    async def body(scene: Scene) -> None:
        for attempt in range(2):
            scene.say("p0", attempt, 0, [], failed())
        scene.cluster.workers["d0"].load.draining = drains
        await asyncio.sleep(0.3)  # its next heartbeat
        scene.say("p0", 2, 0, [], failed("draining"))
        assert scene.active.attempt == (3 if drains else 2)
        assert scene.active.ended is not drains

    play(body)


def test_a_stop_string_cancels_at_the_workers_and_surplus_is_discarded() -> None:
    async def body(scene: Scene) -> None:
        scene.say("p0", 0, 0, WORDS[:1])
        scene.say("d0", 0, 1, WORDS[1:3])
        outcome = await scene.end()
        assert outcome.last.finish_reason == pb.FINISH_REASON_STOP
        assert outcome.token_ids == WORDS[:2]
        assert outcome.last.usage.completion_tokens == 2
        assert len(scene.cluster.workers["d0"].cancels) == 1
        scene.say("d0", 0, 3, WORDS[3:4])  # was on its way: answered with a cancel
        await asyncio.sleep(0.01)
        assert len(scene.cluster.workers["d0"].cancels) == 2
        assert scene.router.metrics.requests_by_slo["met"] == 1

    play(body, stop=["ar"])


def test_the_token_that_stops_has_no_text() -> None:
    async def body(scene: Scene) -> None:
        stop = wpb.Terminal(finish_reason=pb.FINISH_REASON_STOP)
        scene.say("p0", 0, 0, WORDS[:1])
        scene.say("d0", 0, 1, WORDS[1:2], stop)
        outcome = await scene.end()
        whole = scene.router.text.model.tokenizer.decode(WORDS[:1])
        assert outcome.text == whole
        assert outcome.token_ids == WORDS[:2]
        assert outcome.last.finish_reason == pb.FINISH_REASON_STOP

    play(body)


def test_a_worker_that_died_holds_no_expectations() -> None:
    async def body(scene: Scene) -> None:
        handle = scene.router.pool.get("d0")
        assert handle is not None
        assert handle.incoming == (1, 100)
        scene.say("p0", 0, 0, WORDS[:1])
        scene.say("d0", 0, 1, WORDS[1:2])
        assert handle.incoming == (0, 0)

    play(body)

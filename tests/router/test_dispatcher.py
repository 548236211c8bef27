"""Dispatcher: the life of accepted requests, over fake workers in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2 as wpb
from diphase.proto.errors import DigestMismatch, Draining, InvalidRequest, Overloaded, WorkerLost

from ..simulation.virtual_loop import run_virtually
from .fake_workers import expected_tokens
from .fakes import Outcome, fake_cluster, generate, read, start_generation, token_request

PROMPT = list(range(100))
"""Long enough to be prefilled by a prefill worker."""


def test_a_request_is_prefilled_and_decoded_by_a_pair() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                outcome = await generate(router, token_request(PROMPT, 6))
                assert outcome.token_ids == expected_tokens(PROMPT, 6)
                assert outcome.last.finish_reason == pb.FINISH_REASON_LENGTH
                assert outcome.last.usage.prompt_tokens == 100
                assert outcome.last.usage.completion_tokens == 6
                assert (outcome.last.stages.prefill_worker, outcome.last.stages.decode_worker) == ("p0", "d0")
                assert outcome.terminals == 1
            assert len(cluster.workers["p0"].submits) == 1
            assert not cluster.workers["d0"].submits

    run_virtually(main())


def test_a_short_prompt_goes_to_one_worker() -> None:
    async def main() -> None:
        with fake_cluster(handoff_s=0.05) as cluster:
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT, 6))  # shows what a hand-off costs
                outcome = await generate(router, token_request([1, 2, 3], 6))
                assert outcome.token_ids == expected_tokens([1, 2, 3], 6)
                assert outcome.last.stages.prefill_worker == outcome.last.stages.decode_worker == "d0"
                assert outcome.last.stages.handoff_bytes == 0

    run_virtually(main())


def test_a_decode_worker_takes_everything_when_the_prefill_pool_is_dead() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            cluster.workers["p0"].kill()
            async with cluster.router() as router:
                outcome = await generate(router, token_request(PROMPT, 6))
                assert outcome.token_ids == expected_tokens(PROMPT, 6)
                assert outcome.last.stages.prefill_worker == "d0"

    run_virtually(main())


def test_a_submit_is_complete() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT, 6, request_id="r-1"))
            (submit,) = cluster.workers["p0"].submits
            assert submit.client_request_id == "r-1"
            assert submit.gateway_id == "g0"
            assert submit.decode.worker_id == "d0"
            assert submit.decode.address == "d0:1"
            assert submit.sampling.HasField("seed")
            assert submit.sampling.max_tokens == 6
            assert submit.slo.ttft_ms == 2000.0
            assert submit.slo.priority == pb.PRIORITY_STANDARD
            assert submit.elapsed_s == 0.0

    run_virtually(main())


def test_token_1_before_token_0_is_delivered_in_order() -> None:
    async def main() -> None:
        # Frames of different streams overtake each other: delays are far longer than a decode step.
        with fake_cluster(seed=3, handoff_s=0.0001, step_s=0.0002) as cluster:
            async with cluster.router() as router:
                for _ in range(20):
                    outcome = await generate(router, token_request(PROMPT, 12))
                    assert outcome.token_ids == expected_tokens(PROMPT, 12)
                    assert outcome.terminals == 1

    run_virtually(main())


def test_a_cancelled_request_is_cancelled_at_both_workers_at_once() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                generation = await start_generation(router, token_request(PROMPT, 100))
                await read(generation, Outcome(), limit=3)
                generation.close()
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                assert [len(worker.cancels) for worker in cluster.workers.values()] == [1, 1]
                assert not cluster.workers["d0"].live
                assert router.dispatcher.open_requests == 0
                assert router.metrics.requests_by_slo["cancelled"] == 1

    run_virtually(main())


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("after_s", [0.002, 0.014, 0.1])
def test_a_killed_worker_costs_a_pause_but_no_token(victim: str, after_s: float) -> None:
    async def main() -> None:
        with fake_cluster(prefill=2, decode=2) as cluster:
            async with cluster.router() as router:
                call = asyncio.create_task(generate(router, token_request(PROMPT, 20)))
                await asyncio.sleep(after_s)
                cluster.workers[victim].kill()
                outcome = await call
                assert outcome.token_ids == expected_tokens(PROMPT, 20)
                assert outcome.terminals == 1

    run_virtually(main())


def test_a_lost_prefill_worker_does_not_disturb_a_request_that_decodes() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                generation = await start_generation(router, token_request(PROMPT, 20))
                outcome = await read(generation, Outcome(), limit=3)
                cluster.workers["p0"].kill()
                await read(generation, outcome)
                generation.close()
                assert outcome.token_ids == expected_tokens(PROMPT, 20)
                assert outcome.last.stages.attempts == 1

    run_virtually(main())


def test_the_next_attempt_carries_the_emitted_tokens() -> None:
    async def main() -> None:
        with fake_cluster(decode=2) as cluster:
            cluster.workers["d0"].steps_before_failure = 4
            async with cluster.router() as router:
                outcome = await generate(router, token_request(PROMPT, 20))
                assert outcome.token_ids == expected_tokens(PROMPT, 20)
                assert outcome.last.stages.attempts == 2
                assert outcome.last.stages.decode_worker == "d1"
            first, second = cluster.workers["p0"].submits
            assert (first.attempt, second.attempt) == (0, 1)
            assert list(second.emitted_token_ids) == expected_tokens(PROMPT, 5)
            assert second.sampling.seed == first.sampling.seed

    run_virtually(main())


def test_the_last_failure_is_the_clients_error() -> None:
    async def main() -> None:
        errors = [
            wpb.WireError(code="out_of_blocks", message="full", retryable=True),
            wpb.WireError(code="out_of_blocks", message="full", retryable=True),
            wpb.WireError(code="digest_mismatch", message="the third one", retryable=True),
        ]
        with fake_cluster() as cluster:
            cluster.workers["p0"].refuse = errors
            async with cluster.router(max_attempts=3) as router:
                outcome = await generate(router, token_request(PROMPT))
                assert isinstance(outcome.error, DigestMismatch)
                assert outcome.error.message == "the third one"
                assert outcome.error.retry_after_s is not None
                assert outcome.terminals == 1
                assert router.metrics.requests_by_slo["error"] == 1
            assert len(cluster.workers["p0"].submits) == 3

    run_virtually(main())


DRAINS = wpb.WireError(code="draining", message="this worker takes no new work", retryable=True)


def test_a_worker_that_refuses_as_if_it_drained_and_stays_is_not_tried_for_ever() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            cluster.workers["p0"].refuse = [DRAINS] * 1000
            async with cluster.router(max_attempts=3) as router:
                outcome = await generate(router, token_request(PROMPT))
                assert isinstance(outcome.error, Draining)
                assert outcome.terminals == 1
            assert len(cluster.workers["p0"].submits) == 1 + 3

    run_virtually(main())


def test_the_first_such_refusal_of_each_worker_costs_no_attempt() -> None:
    async def main() -> None:
        with fake_cluster(prefill=2) as cluster:
            for name in ("p0", "p1"):
                cluster.workers[name].refuse = [DRAINS]
            async with cluster.router(max_attempts=1) as router:
                outcome = await generate(router, token_request(PROMPT))
                assert outcome.token_ids == expected_tokens(PROMPT, 8)
                assert outcome.last.stages.attempts == 3

    run_virtually(main())


def test_a_hand_off_that_a_decode_worker_has_no_room_for_goes_to_another_one() -> None:
    async def main() -> None:
        with fake_cluster(decode=2) as cluster:
            full = wpb.WireError(code="overloaded", message="1024 hand-offs wait already", retryable=True)
            cluster.workers["p0"].refuse = [full]
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT))
            first, second = (submit.decode.worker_id for submit in cluster.workers["p0"].submits)
            assert first != second

    run_virtually(main())


def test_an_error_that_a_retry_cannot_help_is_not_retried() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            cluster.workers["p0"].refuse = [wpb.WireError(code="invalid_request", message="no")]
            async with cluster.router() as router:
                outcome = await generate(router, token_request(PROMPT))
                assert isinstance(outcome.error, InvalidRequest)
            assert len(cluster.workers["p0"].submits) == 1

    run_virtually(main())


def test_a_lost_terminal_event_does_not_generate_beyond_max_tokens() -> None:
    async def main() -> None:
        with fake_cluster(decode=1) as cluster:
            async with cluster.router() as router:
                generation = await start_generation(router, token_request(PROMPT, 4))
                outcome = await read(generation, Outcome(), limit=3)
                # All tokens came, their terminal did not: the worker dies in between.
                active = generation._stream.active
                active.take(3, expected_tokens(PROMPT, 4)[3:], [])
                cluster.workers["d0"].kill()
                await read(generation, outcome)
                generation.close()
                assert outcome.token_ids == expected_tokens(PROMPT, 4)
                assert outcome.last.finish_reason == pb.FINISH_REASON_LENGTH
                assert outcome.terminals == 1

    run_virtually(main())


def test_a_request_waits_for_a_worker() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=1) as cluster:
            worker = cluster.workers["d0"]
            worker.kill()
            async with cluster.router(wait_for_workers_s=5.0) as router:
                call = asyncio.create_task(generate(router, token_request(PROMPT, 4)))
                await asyncio.sleep(1.0)
                worker.restarted().start()
                outcome = await call
                assert outcome.token_ids == expected_tokens(PROMPT, 4)

    run_virtually(main())


def test_a_request_does_not_wait_for_ever() -> None:
    async def main() -> None:
        with fake_cluster(prefill=1, decode=0) as cluster:
            async with cluster.router(wait_for_workers_s=2.0) as router:
                before = asyncio.get_running_loop().time()
                outcome = await generate(router, token_request(PROMPT, 4))
                assert isinstance(outcome.error, WorkerLost)
                assert outcome.error.retry_after_s is not None
                assert asyncio.get_running_loop().time() - before == pytest.approx(2.0)

    run_virtually(main())


def test_a_running_request_id_is_not_taken_twice() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                first = await start_generation(router, token_request(PROMPT, request_id="same"))
                second = await generate(router, token_request(PROMPT, request_id="same"))
                assert isinstance(second.error, InvalidRequest)
                outcome = await read(first, Outcome())
                first.close()
                assert outcome.error is None
                third = await generate(router, token_request(PROMPT, request_id="same"))
                assert third.error is None

    run_virtually(main())


@pytest.mark.parametrize(
    ("limits", "accepted"),
    [({"max_queued_requests": 2}, 2), ({"max_queued_tokens": 350}, 3), ({"max_open_requests": 4}, 4)],
)
def test_hard_limits_reject_with_a_retry_after(limits: dict[str, Any], accepted: int) -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router(**limits) as router:
                outcomes = await asyncio.gather(
                    *(generate(router, token_request(PROMPT, 3)) for _ in range(6))
                )
                errors = [outcome.error for outcome in outcomes if outcome.error is not None]
                assert len(errors) == 6 - accepted
                for error in errors:
                    assert isinstance(error, Overloaded)
                    assert error.retry_after_s is not None
                assert router.metrics.requests_by_slo["rejected"] == len(errors)
                assert router.dispatcher.admission.queued_requests == 0
                assert router.dispatcher.admission.queued_tokens == 0

    run_virtually(main())


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                call = asyncio.create_task(generate(router, token_request(PROMPT, 20)))
                await asyncio.sleep(0.05)
                drained = asyncio.create_task(router.dispatcher.drain())
                await asyncio.sleep(0.01)
                refused = await generate(router, token_request(PROMPT))
                assert isinstance(refused.error, Draining)
                assert not drained.done()
                assert (await call).token_ids == expected_tokens(PROMPT, 20)
                await drained

    run_virtually(main())


def test_the_finisher_is_acknowledged_and_stale_outputs_are_cancelled() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT, 4, request_id="r"))
                await asyncio.sleep(0.2)
                assert cluster.workers["d0"].acknowledged == [cluster.journal.records["r"].request_id]
                assert not cluster.workers["d0"].attempts
                stale = wpb.SequenceOutput(request_id="unheard-of", attempt=2, token_ids=[7])
                router.dispatcher.outputs(router.pool.handles()[0], [stale])
                await asyncio.sleep(0.01)
                (cancel,) = cluster.workers["d0"].cancels
                assert (cancel.request_id, cancel.attempt) == ("unheard-of", 2)

    run_virtually(main())


def test_a_hung_worker_that_wakes_up_is_told_to_stop() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=2) as cluster:
            async with cluster.router() as router:
                call = asyncio.create_task(generate(router, token_request(PROMPT, 200)))
                await asyncio.sleep(0.5)
                (busy,) = [worker for worker in cluster.workers.values() if worker.live]
                cluster.network.silence(busy.address)
                outcome = await call
                assert outcome.token_ids == expected_tokens(PROMPT, 200)
                assert outcome.last.stages.attempts == 2
                cluster.network.unsilence(busy.address)
                await asyncio.sleep(1.0)
                assert not busy.live

    run_virtually(main())


def test_the_journal_hears_of_every_change() -> None:
    async def main() -> None:
        with fake_cluster(decode=2) as cluster:
            cluster.workers["d0"].steps_before_failure = 2
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT, 8, request_id="r"))
            assert cluster.journal.history["r"] == ["accepted", "placed", "placed", "finished"]
            record = cluster.journal.records["r"]
            assert (record.attempt, record.prefill, record.decode) == (1, "p0", "d1")
            assert record.seed == cluster.workers["p0"].submits[0].sampling.seed

    run_virtually(main())

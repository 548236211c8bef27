"""Re-attaching to a running request through the same or another gateway."""

from __future__ import annotations

import asyncio

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2 as wpb
from diphase.proto.errors import Cancelled, InvalidRequest, NotFound, WorkerLost

from ..simulation.virtual_loop import run_virtually
from .fake_workers import Attempt, expected_tokens
from .fakes import Outcome, fake_cluster, generate, read, start_generation, token_request

PROMPT = list(range(100))


def resume_request(request_id: str, resume_from: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, resume_from=resume_from)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_another_gateway_goes_on_where_the_lost_one_stopped(taken: int) -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                before = Outcome()
                if taken:
                    await read(generation, before, limit=taken)
                else:
                    await asyncio.sleep(0.001)  # submitted, no token yet
                after = await generate(second, resume_request("r", taken))
                assert after.error is None
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 12)
                whole = await generate(first, token_request(PROMPT, 12))
                assert before.text + after.text == whole.text
                assert after.last.usage.completion_tokens == 12
                assert after.terminals == 1

    run_virtually(main())


def test_a_request_on_its_way_between_the_workers_is_found() -> None:
    async def main() -> None:
        with fake_cluster(handoff_s=0.3) as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                before = await read(generation, Outcome(), limit=1)
                after = await generate(second, resume_request("r", 1))
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 12)

    run_virtually(main())


def test_a_request_is_found_whose_gateway_died_before_it_was_journalled() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                before = await read(generation, Outcome(), limit=2)
                del cluster.journal.records["r"]
                after = await generate(second, resume_request("r", 2))
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 12)

    run_virtually(main())


def test_workers_are_asked_again_when_neither_knows_a_running_request() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                before = await read(generation, Outcome(), limit=2)
                decode = cluster.workers["d0"]
                name = decode.named("r")
                between = decode.attempts.pop(name)  # prefill has let go, decode has not taken hold
                call = asyncio.create_task(generate(second, resume_request("r", 2)))
                await asyncio.sleep(0.1)
                decode.attempts[name] = between
                after = await call
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 12)

    run_virtually(main())


def test_the_gateway_that_loses_a_request_neither_cancels_it_nor_counts_it() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                call = asyncio.create_task(generate(first, token_request(PROMPT, 12, request_id="r")))
                await asyncio.sleep(0.1)
                after = await generate(second, resume_request("r", 0))
                before = await call
                assert isinstance(before.error, WorkerLost)
                assert after.token_ids == expected_tokens(PROMPT, 12)
                assert sum(first.metrics.requests_by_slo.values()) == 0
                assert sum(second.metrics.requests_by_slo.values()) == 1
                assert not any(worker.cancels for worker in cluster.workers.values())

    run_virtually(main())


def test_the_same_gateway_hands_the_stream_over() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                call = asyncio.create_task(generate(router, token_request(PROMPT, 12, request_id="r")))
                await asyncio.sleep(0.1)
                after = await generate(router, resume_request("r", 2))
                before = await call
                assert isinstance(before.error, Cancelled)
                assert before.token_ids == expected_tokens(PROMPT, len(before.token_ids))
                assert after.token_ids == expected_tokens(PROMPT, 12)[2:]
                assert after.responses[0].index == 2
                assert router.metrics.requests_by_slo["cancelled"] == 0

    run_virtually(main())


def test_a_request_whose_re_attaching_client_leaves_during_the_search_is_cancelled_everywhere() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 100, request_id="r"))
                await read(generation, Outcome(), limit=3)
                cluster.network.silence(cluster.workers["p0"].address)  # the search waits for its answer
                call = asyncio.create_task(generate(second, resume_request("r", 3)))
                await asyncio.sleep(0.1)
                assert second.dispatcher.open_requests == 1
                call.cancel()
                await asyncio.wait([call])
                assert second.dispatcher.open_requests == 0
                await second.dispatcher.drain()
                await asyncio.sleep(0.1)
                assert not cluster.workers["d0"].live

    run_virtually(main())


def test_a_client_that_leaves_during_the_search_takes_nothing_from_another_that_stays() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 100, request_id="r"))
                before = await read(generation, Outcome(), limit=3)
                cluster.network.silence(cluster.workers["p0"].address)
                leaving = asyncio.create_task(generate(second, resume_request("r", 3)))
                await asyncio.sleep(0.1)
                staying = asyncio.create_task(generate(second, resume_request("r", 3)))
                await asyncio.sleep(0.1)
                leaving.cancel()
                after = await staying
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 100)

    run_virtually(main())


def test_a_client_that_claims_tokens_beyond_the_stop_is_told_where_it_was() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                whole = await generate(first, token_request(PROMPT, 12))
                stop = whole.responses[5].text
                before = whole.text.index(stop)
                sampling = pb.Sampling(max_tokens=12, stop=[stop])
                stopped = await generate(first, token_request(PROMPT, sampling=sampling))
                assert stopped.text == whole.text[:before]
                generation = await start_generation(
                    first, token_request(PROMPT, sampling=sampling, request_id="r")
                )
                await read(generation, Outcome(), limit=1)
                after = await generate(second, resume_request("r", 11))
                assert not after.token_ids
                assert after.last.usage.completion_tokens == stopped.last.usage.completion_tokens

    run_virtually(main())


def test_a_re_attached_request_survives_the_next_loss() -> None:
    async def main() -> None:
        with fake_cluster(decode=2) as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 30, request_id="r"))
                before = await read(generation, Outcome(), limit=3)
                call = asyncio.create_task(generate(second, resume_request("r", 3)))
                await asyncio.sleep(0.1)
                (busy,) = [worker for worker in cluster.workers.values() if worker.live]
                busy.kill()
                after = await call
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 30)
                assert after.last.stages.attempts == 2

    run_virtually(main())


def test_without_the_journal_every_worker_is_asked() -> None:
    async def main() -> None:
        with fake_cluster(decode=3) as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                await read(generation, Outcome(), limit=3)
                cluster.journal.available = False
                after = await generate(second, resume_request("r", 0))
                assert after.token_ids == expected_tokens(PROMPT, 12)

    run_virtually(main())


def test_log_probabilities_are_replayed_with_their_tokens() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                sampling = pb.Sampling(max_tokens=8, logprobs=1)
                generation = await start_generation(
                    first, token_request(PROMPT, request_id="r", sampling=sampling)
                )
                before = await read(generation, Outcome(), limit=4)
                first_half = [x.logprob for response in before.responses for x in response.logprobs]
                assert first_half == [0.0, -1.0, -2.0, -3.0]
                after = await generate(second, resume_request("r", 2))
                replayed = [x.logprob for response in after.responses for x in response.logprobs]
                assert replayed == [-2.0, -3.0, -4.0, -5.0, -6.0, -7.0]

    run_virtually(main())


def test_what_nobody_knows_is_not_found() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                outcome = await generate(router, resume_request("unheard-of", 0))
                assert isinstance(outcome.error, NotFound)
                await generate(router, token_request(PROMPT, 2, request_id="r"))
                outcome = await generate(router, resume_request("r", 0))
                assert isinstance(outcome.error, NotFound)
                assert "finished" in outcome.error.message

    run_virtually(main())


def test_gateway_and_worker_lost_together_is_a_retryable_failure() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g1") as second:
                async with cluster.router("g0") as first:
                    generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                    await read(generation, Outcome(), limit=3)
                cluster.workers["d0"].kill()
                cluster.workers["d0"].restarted().start()
                await asyncio.sleep(1.0)
                outcome = await generate(second, resume_request("r", 3))
                assert isinstance(outcome.error, WorkerLost)
                assert outcome.error.retryable

    run_virtually(main())


def test_a_gateway_that_died_is_replaced_by_another() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g1") as second:
                async with cluster.router("g0") as first:
                    generation = await start_generation(first, token_request(PROMPT, 12, request_id="r"))
                    before = await read(generation, Outcome(), limit=3)
                await asyncio.sleep(0.1)
                after = await generate(second, resume_request("r", 3))
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 12)

    run_virtually(main())


def test_a_gateway_that_was_restarted_under_its_name_cancels_nothing_and_can_be_asked() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first:
                generation = await start_generation(first, token_request(PROMPT, 100, request_id="r"))
                before = await read(generation, Outcome(), limit=3)
            cluster.network.silence(cluster.workers["d0"].address)
            async with cluster.router("g0") as again:
                call = asyncio.create_task(generate(again, resume_request("r", 3)))
                await asyncio.sleep(0.3)
                cluster.network.unsilence(cluster.workers["d0"].address)
                after = await call
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 100)
                assert not any(worker.cancels for worker in cluster.workers.values())

    run_virtually(main())


def test_two_clients_may_call_their_requests_the_same() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                calls = [
                    asyncio.create_task(generate(first, token_request(PROMPT, 30, request_id="r"))),
                    asyncio.create_task(generate(second, token_request(PROMPT[:50], 12, request_id="r"))),
                ]
                outcomes = [await call for call in calls]
                assert outcomes[0].token_ids == expected_tokens(PROMPT, 30)
                assert outcomes[1].token_ids == expected_tokens(PROMPT[:50], 12)

    run_virtually(main())


def test_without_the_journal_the_newest_request_of_that_name_is_meant_and_the_other_goes_on() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                other = asyncio.create_task(generate(first, token_request(PROMPT, 60, request_id="r")))
                await asyncio.sleep(0.2)
                generation = await start_generation(second, token_request(PROMPT[:50], 60, request_id="r"))
                before = await read(generation, Outcome(), limit=3)
                del cluster.journal.records["r"]
                async with cluster.router("g2") as third:
                    after = await generate(third, resume_request("r", 3))
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT[:50], 60)
                assert (await other).token_ids == expected_tokens(PROMPT, 60)

    run_virtually(main())


def test_a_name_may_be_used_again_also_after_asking_for_it_elsewhere() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                for _ in range(4):
                    unknown = await generate(second, resume_request("r", 0))
                    assert isinstance(unknown.error, NotFound)
                    outcome = await generate(first, token_request(PROMPT, 12, request_id="r"))
                    assert outcome.token_ids == expected_tokens(PROMPT, 12)
                    assert outcome.last.stages.attempts == 1

    run_virtually(main())


def test_a_failed_attempt_that_answers_first_does_not_stand_for_the_one_that_runs() -> None:
    async def main() -> None:
        with fake_cluster(colocated=1) as cluster:
            failed_at = cluster.workers["c0"]
            failed_at.load = wpb.Load(blocks_total=1000, waiting_tokens=10**6)
            error = wpb.WireError(code="out_of_blocks", message="broke", retryable=True)
            cluster.workers["p0"].refuse.append(error)
            async with cluster.router("g0") as first, cluster.router("g1") as second:
                await asyncio.sleep(1.0)
                generation = await start_generation(first, token_request(PROMPT, 30, request_id="r"))
                before = await read(generation, Outcome(), limit=3)
                [running] = cluster.workers["d0"].attempts.values()
                submit = running.submit
                assert submit.attempt == 1
                earlier = wpb.Submit()
                earlier.CopyFrom(submit)
                earlier.attempt = 0
                failed_at.attempts[submit.request_id] = Attempt(
                    earlier, "gone", [], terminal=wpb.Terminal(error=error)
                )
                del cluster.journal.records["r"]
                after = await generate(second, resume_request("r", 3))
                assert after.error is None
                assert before.token_ids + after.token_ids == expected_tokens(PROMPT, 30)

    run_virtually(main())


def test_a_re_attach_must_bring_nothing_else() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                for message in (
                    pb.GenerateRequest(resume_from=0),
                    pb.GenerateRequest(resume_from=0, request_id="r", prompt="x"),
                    pb.GenerateRequest(resume_from=0, request_id="r", sampling=pb.Sampling(top_k=1)),
                    pb.GenerateRequest(resume_from=0, request_id="r", slo=pb.Slo(ttft_ms=1)),
                ):
                    outcome = await generate(router, message)
                    assert isinstance(outcome.error, InvalidRequest)

    run_virtually(main())

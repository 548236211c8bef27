"""WorkerPool: liveness, clocks, membership, prefix caches, over fake workers in virtual time."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from diphase.proto.errors import WorkerLost
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.router.gateway import Router
from diphase.router.latency_model import INFORMED_SAMPLES
from diphase.router.links import FrameSink, Link, WorkerSilent
from diphase.router.membership import Member
from diphase.router.step_time import StepShape
from diphase.router.worker_handle import WorkerHandle, WorkerState

from ..simulation.virtual_loop import run_virtually
from .fake_workers import BLOCK_SIZE, LAYOUT
from .fakes import FakeCluster, Members, fake_cluster, generate, token_request, until

PROMPT = list(range(100))


def handle_of(router: Router, worker_id: str) -> WorkerHandle:
    handle = router.pool.get(worker_id)
    assert handle is not None
    return handle


async def seconds_until(router: Router, worker_id: str, state: WorkerState) -> float:
    loop = asyncio.get_running_loop()
    started = loop.time()
    await until(lambda: handle_of(router, worker_id).state is state)
    return loop.time() - started


def test_workers_become_ready_when_their_clock_is_known() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                assert {handle.state for handle in router.pool.ready()} == {WorkerState.READY}
                for handle in router.pool.handles():
                    now = asyncio.get_running_loop().time()
                    assert handle.clock.to_gateway(now + 1000.0) == pytest.approx(now, abs=1e-6)

    run_virtually(main())


def test_a_silent_worker_counts_as_hung_within_two_seconds() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                await asyncio.sleep(1.0)
                cluster.network.silence("d0:1")
                assert await seconds_until(router, "d0", WorkerState.HUNG) <= 2.0
                cluster.network.unsilence("d0:1")
                assert await seconds_until(router, "d0", WorkerState.READY) <= 0.3

    run_virtually(main())


def test_a_worker_that_was_silent_before_this_gateway_came_counts_as_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            dial = cluster.network.open

            def silent(address: str, *more: Any) -> Any:
                if address == "d0:1":
                    raise WorkerSilent(f"the worker at {address} did not answer in 5 s")
                return dial(address, *more)

            monkeypatch.setattr(cluster.network, "open", silent)
            async with cluster.router() as router:
                await seconds_until(router, "d0", WorkerState.HUNG)
                await asyncio.sleep(5.0)  # several dials
                assert handle_of(router, "d0").state is WorkerState.HUNG
                monkeypatch.setattr(cluster.network, "open", dial)
                await seconds_until(router, "d0", WorkerState.READY)

    run_virtually(main())


def test_a_worker_whose_step_does_not_end_counts_as_hung() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                worker = cluster.workers["d0"]
                worker.step_age_s = 1.9
                await asyncio.sleep(1.0)
                assert handle_of(router, "d0").state is WorkerState.READY
                worker.step_age_s = 2.1
                await asyncio.sleep(0.3)
                assert handle_of(router, "d0").state is WorkerState.HUNG

    run_virtually(main())


def test_a_long_step_that_was_predicted_is_no_hang() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                handle = handle_of(router, "d0")
                handle.step_age_s, handle.step_predicted_s = 9.0, 2.0
                handle.last_frame_at = 100.0
                assert handle.hang_reason(100.1, 1.8) is None
                handle.step_age_s = 10.1
                assert "a step has run for 10.1 s" in str(handle.hang_reason(100.1, 1.8))

    run_virtually(main())


def test_a_killed_worker_is_noticed_at_once_and_used_again_when_it_is_back() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                cluster.workers["d0"].kill()
                await asyncio.sleep(0.001)
                assert handle_of(router, "d0").state is WorkerState.CONNECTING
                cluster.workers["d0"].restarted().start()
                assert await seconds_until(router, "d0", WorkerState.READY) <= 0.3
                assert handle_of(router, "d0").incarnation == "2"

    run_virtually(main())


def test_a_draining_worker_gets_nothing_new() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=2) as cluster:
            cluster.workers["d0"].load.draining = True
            async with cluster.router() as router:
                await asyncio.sleep(0.3)
                assert handle_of(router, "d0").state is WorkerState.DRAINING
                for _ in range(4):
                    await generate(router, token_request(PROMPT, 2))
            assert not cluster.workers["d0"].submits
            assert len(cluster.workers["d1"].submits) == 4

    run_virtually(main())


def test_a_worker_that_drains_by_the_registry_gets_nothing_new_before_it_says_so_itself() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=2) as cluster:
            here = [worker.member for worker in cluster.workers.values()]
            members = Members(here)
            async with cluster.router(membership=members) as router:
                assert handle_of(router, "d0").state is WorkerState.READY
                members.set([replace(here[0], draining=True), here[1]])
                await asyncio.sleep(0.01)
                assert handle_of(router, "d0").state is WorkerState.DRAINING
                for _ in range(4):
                    await generate(router, token_request(PROMPT, 2))
                assert not cluster.workers["d0"].submits
                members.set(here)
                await asyncio.sleep(0.01)
                assert handle_of(router, "d0").state is WorkerState.READY

    run_virtually(main())


def test_the_registry_says_a_workers_layout_before_there_is_a_stream_and_its_hello_is_right_in_the_end() -> (
    None
):
    async def main() -> None:
        with fake_cluster(prefill=0, decode=1) as cluster:
            told = replace(
                cluster.workers["d0"].member, layout_hash="told", protocol_version=7, package_version="9.9"
            )
            away = Member(worker_id="d9", role="decode", address="nobody:1", incarnation="1", layout_hash="x")
            supervisor = Member(worker_id="supervisor", role="supervisor", address="s:1", incarnation="1")
            async with cluster.router(membership=Members([told, away, supervisor])) as router:
                assert handle_of(router, "d0").layout_hash == LAYOUT
                assert handle_of(router, "d0").protocol_version == PROTOCOL_VERSION
                assert handle_of(router, "d9").layout_hash == "x"
                assert router.pool.supervisor == "s:1"
                assert len(router.pool.handles()) == 2

    run_virtually(main())


def test_membership_brings_and_takes_workers() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=2) as cluster:
            members = Members([cluster.workers["d0"].member])
            async with cluster.router(membership=members) as router:
                assert [handle.worker_id for handle in router.pool.ready()] == ["d0"]
                members.set([cluster.workers["d0"].member, cluster.workers["d1"].member])
                await asyncio.sleep(0.1)
                assert [handle.worker_id for handle in router.pool.ready()] == ["d0", "d1"]
                call = asyncio.create_task(generate(router, token_request(PROMPT, 20)))
                await asyncio.sleep(0.1)
                members.set([])
                outcome = await call  # what runs may end on a worker that leaves
                assert outcome.error is None
                assert outcome.last.stages.attempts == 1
                cluster.stop()
                await asyncio.sleep(0.1)
                assert router.pool.handles() == []

    run_virtually(main())


class LateLink:
    """A link that answers its cancellation with the end of its stream, as gRPC may when it just broke."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.send, self.send_later, self.flush = link.send, link.send_later, link.flush

    async def run(self, on_frame: FrameSink) -> None:
        try:
            await self._link.run(on_frame)
        except asyncio.CancelledError:
            raise WorkerLost("the stream broke") from None


def test_a_worker_that_leaves_while_its_stream_breaks_takes_nobody_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=2) as cluster:
            dial = cluster.network.link
            monkeypatch.setattr(
                cluster.network, "link", lambda address, hello: LateLink(dial(address, hello))
            )
            d0, d1 = cluster.workers["d0"].member, cluster.workers["d1"].member
            members = Members([d0, d1])
            cluster.network.silence("d0:1")  # dialled, and not attached yet
            async with cluster.router(membership=members) as router:
                members.set([d1])
                await asyncio.sleep(0.1)
                assert [handle.worker_id for handle in router.pool.handles()] == ["d1"]
                cluster.network.unsilence("d0:1")
                members.set([d0, d1])
                await asyncio.sleep(0.2)
                assert {handle.worker_id for handle in router.pool.ready()} == {"d0", "d1"}

    run_virtually(main())


def test_a_worker_of_another_model_or_protocol_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(cluster: FakeCluster) -> None:
        async with cluster.router() as router:
            assert [handle.worker_id for handle in router.pool.ready()] == ["p0"]

    async def wrong(**fields: object) -> None:
        with fake_cluster() as cluster:
            worker = cluster.workers["d0"]
            hello = worker.hello()
            for name, value in fields.items():
                setattr(hello, name, value)
            monkeypatch.setattr(worker, "hello", lambda: hello)
            await main(cluster)

    run_virtually(wrong(model="another"))
    run_virtually(wrong(protocol_version=99))


def test_why_a_worker_never_attaches_is_kept_and_logged_whenever_it_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("worker_not_attached")]

    async def main() -> None:
        with fake_cluster() as cluster:
            worker = cluster.workers["d0"]
            good = worker.hello()
            other = worker.hello()
            other.model = "another"
            monkeypatch.setattr(worker, "hello", lambda: other)
            async with cluster.router() as router:
                handle = handle_of(router, "d0")
                await asyncio.sleep(5.0)  # several dials
                assert "it serves model 'another'" in handle.detail
                assert len(said()) == 1
                assert "worker=d0" in said()[0]
                assert handle.detail in said()[0]
                other.protocol_version = 99
                await asyncio.sleep(5.0)
                assert "it speaks protocol 99" in handle.detail
                assert len(said()) == 2
                monkeypatch.setattr(worker, "hello", lambda: good)
                await seconds_until(router, "d0", WorkerState.READY)
                assert handle.detail == ""

    run_virtually(main())


def test_step_samples_feed_the_latency_model_of_worker_and_role() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0, decode=1, step_s=0.02) as cluster:
            async with cluster.router() as router:
                await generate(router, token_request(PROMPT, 30))
                model = handle_of(router, "d0").model
                assert model.num_samples == 30
                assert model.step_s(StepShape(decode_batch=1, decode_context=15)) == pytest.approx(
                    0.02, rel=0.1
                )
                drift = handle_of(router, "d0").drift
                assert drift.num_steps == 30 - INFORMED_SAMPLES, "before that, predictions promise nothing"
                assert router.pool.step_error("decode") == drift.error < 0.05
                assert math.isnan(router.pool.step_error("prefill"))
                read = router.metrics.registry.get_sample_value
                assert read("diphase_step_error", {"role": "decode"}) == drift.error

    run_virtually(main())


def test_snapshots_tell_what_is_cached() -> None:
    async def main() -> None:
        with fake_cluster(prefill=2, decode=1) as cluster:
            async with cluster.router("g0") as router:
                await generate(router, token_request(PROMPT, 2))
            (used,) = [worker for worker in cluster.workers.values() if worker.submits]
            async with cluster.router("g1") as router:
                assert router.pool.prefixes.num_blocks(used.worker_id) == len(PROMPT) // BLOCK_SIZE
                used.submits.clear()
                for _ in range(3):
                    await generate(router, token_request([*PROMPT, 7], 2))
            assert len(used.submits) == 3

    run_virtually(main())

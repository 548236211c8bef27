"""Workers that crash, drain and change their role in the simulator: nothing is lost, stretches stay exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.incidents import Crash, Drain, Incident, RoleChange
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.simulator import Simulation
from diphase.proto.errors import ConfigError
from diphase.router.config import POLICIES, RouterConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from .deployments import (
    CLUSTERS,
    MS,
    ROWS,
    colocated_worker,
    decode_worker,
    deployment,
    fully_linked,
    prefill_worker,
    records,
    run,
)

HANDED_OVER = SimulationConfig(router=RouterConfig(local_prefill_tokens=0))
TWO_POOLS = CLUSTERS["2P2D"]
SPECS = [prefill_worker(), decode_worker(), colocated_worker(60)]


def incidents(workers: int) -> st.SearchStrategy[list[Incident]]:
    """Up to five, while requests are there or soon after."""
    where = st.integers(0, workers - 1)
    when = st.integers(0, 2000).map(lambda ms: ms / 1000.0)
    soon = st.sampled_from([0.001, 0.05, 0.3, 2.0, 20.0])
    crash = st.builds(Crash, at_s=when, worker=where, hangs=st.booleans(), back_s=st.none() | soon)
    drain = st.builds(Drain, at_s=when, worker=where, timeout_s=soon)
    change = st.builds(
        RoleChange, at_s=when, worker=where, timeout_s=soon, successor=st.sampled_from(SPECS), start_s=soon
    )
    return st.lists(st.one_of(crash, crash, drain, change), min_size=1, max_size=5)


def check_nothing_is_left(simulation: Simulation, result: SimResult) -> None:
    served = [request for request in simulation.requests if request.last_token >= 0]
    assert all(bool(request.error) == (request.last_token < 0) for request in simulation.requests)
    assert len(served) + result.rejected + result.failed == len(simulation.requests)
    for worker in simulation.workers:
        if not worker.alive:
            continue
        counts = worker.blocks.counts()
        assert counts.free + counts.cached == counts.total
        assert worker.idle
        assert not worker.unscheduled
        assert not worker.draining  # it would have ended
    dispatcher = simulation._dispatcher
    assert not dispatcher.open
    assert (dispatcher._admission.queued_requests, dispatcher._admission.queued_tokens) == (0, 0)
    simulation._pool.ready()  # all report anew
    for worker in simulation._pool.workers:
        handle = simulation._pool.handle(worker)
        assert (handle.incoming, handle.waiting_requests) == ((0, 0), 0)
        assert handle.attached == worker.alive
    for request in served:
        stamps = [request.arrival, request.scheduled, request.token0, request.last_token]
        stamps[3:3] = [] if request.verified < 0 else [request.verified, request.joined]
        assert stamps == sorted(stamps)
        assert request.attempts >= 1
        assert request.interrupted < 0


@pytest.mark.parametrize("name", CLUSTERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=ROWS, hashes=st.booleans(), policy=st.sampled_from(list(POLICIES)))
def test_whatever_befalls_workers_stretches_are_exact_and_every_request_ends_once(
    name: str, data: st.DataObject, rows: list[tuple[int, int, int]], hashes: bool, policy: str
) -> None:
    cluster = fully_linked(CLUSTERS[name])
    befalls = data.draw(incidents(len(cluster.workers)))
    config = SimulationConfig(router=RouterConfig(policy=policy, wait_for_workers_s=1.0))
    results = []
    for exact in (True, False):
        result, simulation = run(cluster, rows, replace(config, exact=exact), hashes, befalls)
        check_nothing_is_left(simulation, result)
        use = [(worker.steps, worker.busy_ns) for worker in simulation.workers]
        results.append((records(simulation), use, result.duration_s))
    assert results[0] == results[1]


def prefill_s(tokens: int) -> float:
    """Of a prompt in one step, by deployments.STEPS."""
    return 3.1e-3 + 1.7e-5 * tokens + 3.3e-9 * tokens * tokens / 2


def decode_s(context: int) -> float:
    return 3.1e-3 + 1.3e-4 + 7.7e-8 * context


def test_a_lost_decode_worker_costs_its_detection_and_the_prompt_with_what_was_generated() -> None:
    cluster = deployment(prefill_worker(chunk=512), decode_worker(), decode_worker())
    undisturbed = run(cluster, [(0, 48, 60)], HANDED_OVER)[1].requests[0]
    crash = Crash(at_s=0.1, worker=1)
    result, simulation = run(cluster, [(0, 48, 60)], HANDED_OVER, incidents=[crash])
    (request,) = simulation.requests
    generated, at = 1, undisturbed.joined / 1e9
    while (at := at + decode_s(48 + generated)) <= 0.1:
        generated += 1
    assert 20 < generated < 40
    assert request.attempts == 2
    assert (undisturbed.decode_worker, request.decode_worker) == (1, 2)
    assert request.stall == pytest.approx((0.1 + prefill_s(48 + generated)) * 1e9, abs=2)
    assert request.token0 == undisturbed.token0
    left = range(48 + generated + 1, 48 + 60)
    assert request.last_token - request.joined == pytest.approx(sum(map(decode_s, left)) * 1e9, abs=60)
    assert (result.retried, result.failed) == (1, 0)
    assert result.stall_ms[0] == request.stall / 1e6


def test_a_worker_that_hangs_is_noticed_by_its_silence() -> None:
    stalls = [
        run(TWO_POOLS, [(0, 48, 60)], HANDED_OVER, incidents=[Crash(at_s=0.1, worker=2, hangs=hangs)])[1]
        .requests[0]
        .stall
        for hangs in (False, True)
    ]
    assert stalls[1] - stalls[0] == 1_300_000_000  # 1.3 and a look every 0.1 s, instead of 0.1 s


@pytest.mark.parametrize(
    ("at_s", "attempts"),
    [
        (0.002, 2),  # the prompt is being computed
        (0.00485, 2),  # verified, but the decode worker has sent nothing
        (0.02, 1),
    ],
)
def test_a_lost_prefill_worker_matters_until_the_decode_worker_speaks(at_s: float, attempts: int) -> None:
    cluster = deployment(
        prefill_worker(chunk=512), prefill_worker(chunk=512), decode_worker(), latency_s=1e-5
    )
    crash = Crash(at_s=at_s, worker=0, noticed_after_s=0.0)
    simulation = run(cluster, [(0, 48, 30)], HANDED_OVER, incidents=[crash])[1]
    (request,) = simulation.requests
    assert request.attempts == attempts
    assert request.last_token > 0
    assert request.prefill_worker == attempts - 1


def test_attempts_that_are_used_up_end_a_request() -> None:
    config = SimulationConfig(router=RouterConfig(max_attempts=1))
    result, simulation = run(TWO_POOLS, [(0, 48, 60)], config, incidents=[Crash(at_s=0.05, worker=2)])
    assert (result.failed, result.rejected) == (1, 0)
    assert simulation.requests[0].error == "worker_lost"
    assert result.ttft_ms[0] == float("inf")


@pytest.mark.parametrize(("back_s", "error"), [(1.0, ""), (7.0, "worker_lost")])
def test_a_request_waits_for_workers_but_not_for_ever(back_s: float, error: str) -> None:
    cluster = deployment(colocated_worker())
    crash = Crash(at_s=0.0, worker=0, back_s=back_s)
    (request,) = run(cluster, [(500 * MS, 48, 4)], incidents=[crash])[1].requests
    assert request.error == error
    assert (request.attempts, request.scheduled) == ((1, 1000 * MS) if not error else (0, -1))


def test_a_crash_empties_the_prefix_cache() -> None:
    rows = [(0, 160, 2), (400 * MS, 160, 2)]
    cluster = deployment(colocated_worker())
    cached = [
        run(cluster, rows, hashes=True, incidents=befalls)[1].requests[1].cached_tokens
        for befalls in ([], [Crash(at_s=0.2, worker=0, back_s=0.15)])
    ]
    assert cached == [144, 0]


def test_who_drains_finishes_what_it_has_and_takes_nothing_new() -> None:
    rows = [(0, 48, 60), (150 * MS, 48, 4)]
    plain = run(TWO_POOLS, rows, HANDED_OVER)[1].requests
    drain = Drain(at_s=0.1, worker=2)
    result, simulation = run(TWO_POOLS, rows, HANDED_OVER, incidents=[drain])
    first, second = simulation.requests
    assert (plain[0].decode_worker, first.decode_worker, second.decode_worker) == (2, 2, 3)
    assert first.last_token == plain[0].last_token
    assert result.retried == 0
    assert not simulation.workers[2].alive


def test_what_a_drain_does_not_finish_in_time_goes_on_elsewhere_and_costs_no_attempt() -> None:
    config = SimulationConfig(router=RouterConfig(local_prefill_tokens=0, max_attempts=1))
    drain = Drain(at_s=0.1, worker=2, timeout_s=0.05)
    (request,) = run(TWO_POOLS, [(0, 48, 90)], config, incidents=[drain])[1].requests
    assert (request.attempts, request.decode_worker, request.error) == (2, 3, "")
    assert 0 < request.stall < 50 * MS


def test_a_prompt_on_its_way_to_a_worker_that_drains_goes_to_another() -> None:
    """The third prompt waits on the prefill worker when its decode worker, which is busy, takes no more
    hand-offs."""
    cluster = deployment(prefill_worker(chunk=64), decode_worker(), decode_worker())
    rows = [(0, 64, 200), (30 * MS, 300, 2), (MS, 64, 2)]
    plain = run(cluster, rows, HANDED_OVER)[1].requests
    assert [request.decode_worker for request in plain] == [1, 2, 1]
    drain = Drain(at_s=0.033, worker=1)
    first, _, third = run(cluster, rows, HANDED_OVER, incidents=[drain])[1].requests
    assert (first.decode_worker, first.attempts) == (1, 1)
    assert (third.decode_worker, third.attempts) == (2, 2)
    assert third.scheduled == plain[2].scheduled  # it was refused when its first step began


def test_a_worker_that_changed_its_role_serves_in_the_new_one() -> None:
    cluster = fully_linked(deployment(prefill_worker(), prefill_worker(), decode_worker(max_running=1)))
    change = RoleChange(at_s=0.1, worker=1, successor=decode_worker(), start_s=0.5)
    rows = [(0, 48, 400), (1000 * MS, 48, 40)]
    result, simulation = run(cluster, rows, HANDED_OVER, incidents=[change])
    assert [(r.prefill_worker, r.decode_worker) for r in simulation.requests] == [(0, 2), (0, 1)]
    assert [use.role for use in result.workers] == ["prefill", "prefill", "decode", "decode"]
    assert [worker.alive for worker in simulation.workers] == [True, False, True, True]


def test_incidents_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="worker 4 is not one of the 4"):
        run(TWO_POOLS, [], incidents=[Drain(at_s=0.0, worker=4)])
    change = RoleChange(at_s=0.0, worker=0, successor=decode_worker(), start_s=1.0)
    with pytest.raises(ConfigError, match="worker 1 may come to hand over to worker 0"):
        run(TWO_POOLS, [], incidents=[change])
    with pytest.raises(ConfigError, match="at_s"):
        Drain(at_s=-1.0, worker=0)
    with pytest.raises(ConfigError, match="back_s"):
        Crash(at_s=1.0, worker=0, back_s=0.0)
    with pytest.raises(ConfigError, match="noticed_after_s"):
        Crash(at_s=1.0, worker=0, noticed_after_s=-1.0)
    with pytest.raises(ConfigError, match="timeout_s"):
        Drain(at_s=1.0, worker=0, timeout_s=0.0)
    with pytest.raises(ConfigError, match="start_s"):
        RoleChange(at_s=1.0, worker=0, successor=decode_worker(), start_s=0.0)


def test_a_prompt_of_a_worker_that_drains_is_finished_by_who_has_its_kv() -> None:
    """The prefill worker ends when its hand-off is verified, before the decode worker has sent a token."""
    request = run(TWO_POOLS, [(0, 48, 20)], HANDED_OVER, incidents=[Drain(at_s=0.002, worker=0)])[1].requests[
        0
    ]
    assert (request.attempts, request.stall, request.prefill_worker) == (1, 0, 0)


def test_who_is_to_leave_does_not_come_back_from_a_crash() -> None:
    befalls = [Crash(at_s=0.1, worker=2, back_s=0.5), Drain(at_s=0.3, worker=2)]
    simulation = run(TWO_POOLS, [(0, 48, 20), (1000 * MS, 48, 20)], HANDED_OVER, incidents=befalls)[1]
    assert len(simulation.workers) == 4
    assert simulation.requests[1].decode_worker == 3


def test_a_worker_that_was_lost_with_a_request_does_not_get_it_again_while_there_are_others() -> None:
    cluster = deployment(prefill_worker(), decode_worker(), decode_worker(), decode_worker())
    befalls = [Crash(at_s=0.1, worker=1, back_s=0.2), Crash(at_s=0.5, worker=2)]
    request = run(cluster, [(0, 48, 300)], HANDED_OVER, incidents=befalls)[1].requests[0]
    assert (request.attempts, request.decode_worker) == (3, 3)


def test_room_that_a_lost_hand_off_had_goes_to_the_next() -> None:
    cluster = deployment(prefill_worker(24), prefill_worker(24), decode_worker(24), bandwidth=1e7)
    config = SimulationConfig(router=RouterConfig(local_prefill_tokens=0, max_attempts=1))
    result, simulation = run(
        cluster, [(0, 300, 4), (0, 300, 4)], config, incidents=[Crash(at_s=0.05, worker=0)]
    )
    assert [request.error for request in simulation.requests] == ["worker_lost", ""]
    assert simulation.requests[1].last_token > 0
    assert result.failed == 1


def test_a_link_belongs_to_the_others_as_soon_as_a_worker_is_gone() -> None:
    cluster = deployment(prefill_worker(), prefill_worker(), decode_worker(), bandwidth=1e7)
    shared, alone = (
        run(cluster, [(0, 300, 4), (0, 300, 4)], HANDED_OVER, incidents=befalls)[1].requests[1].verified
        for befalls in ([], [Crash(at_s=0.05, worker=0, noticed_after_s=10.0)])
    )
    assert alone < 0.8 * shared

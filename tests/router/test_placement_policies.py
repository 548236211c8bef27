"""What every placement policy keeps to, and how they are chosen by name."""

from __future__ import annotations

from typing import Any

import pytest
from diphase.proto.block_hash import block_hashes, root_hash
from diphase.router.config import POLICIES, RouterConfig
from diphase.router.forecast import Predictor
from diphase.router.placement import Demand, Placement
from diphase.router.placement_policy import PlacementPolicy, make_policy
from diphase.router.prefix_index import PrefixIndex
from diphase.router.worker_handle import WorkerHandle
from hypothesis import given, settings
from hypothesis import strategies as st

from ..simulation.virtual_loop import run_virtually
from .fakes import fake_cluster, generate, token_request, until
from .placements import PROMPT, demand, names, worker

EVERY = pytest.mark.parametrize("name", POLICIES)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[WorkerHandle], PrefixIndex, set[str], Demand]:
    """Workers of all roles, loads and two layouts; what they have cached; whom to avoid; a request."""
    prefixes = PrefixIndex(10_000)
    workers = []
    for i in range(draw(st.integers(0, 7))):
        role = draw(st.sampled_from(["prefill", "decode", "colocated"]))
        load: dict[str, Any] = {
            "waiting_requests": draw(st.integers(0, 3)),
            "waiting_tokens": draw(st.sampled_from([0, 100, 5000, 9000])),
            "running": draw(st.integers(0, 20)),
            "running_context": draw(st.integers(0, 9000)),
            "blocks_free": draw(st.integers(0, 1000)),
            "blocks_running": draw(st.integers(0, 1000)),
            "handoffs": draw(st.integers(0, 2)),
        }
        handle = worker(f"w{i}", role, layout=draw(st.sampled_from(["L", "M"])), **load)
        cached = draw(st.sampled_from([0, 0, 64, 400]))
        if cached:
            prefixes.snapshot(f"w{i}", 0, block_hashes(PROMPT[:cached], 16, root_hash(handle.layout_hash)))
        workers.append(handle)
    avoid = draw(st.sets(st.sampled_from([f"w{i}" for i in range(7)])))
    return workers, prefixes, avoid, demand(PROMPT[: draw(st.integers(1, 400))], draw(st.integers(1, 500)))


def policy_of(name: str, prefixes: PrefixIndex) -> PlacementPolicy:
    return make_policy(RouterConfig(policy=name), prefixes)


@EVERY
@settings(max_examples=200, deadline=None)
@given(scene=clusters())
def test_a_placement_is_possible_and_avoids_whom_it_can(
    name: str, scene: tuple[list[WorkerHandle], PrefixIndex, set[str], Demand]
) -> None:
    workers, prefixes, avoid, request = scene
    placement = policy_of(name, prefixes).place(request, workers, avoid)
    decodes = [w for w in workers if w.role != "prefill"]
    if placement is None:
        assert not decodes
        return
    assert any(placement.decode is w for w in decodes)
    assert placement.decode.worker_id not in avoid or avoid.issuperset(w.worker_id for w in decodes)
    if placement.prefill is not None:
        prefills = [w for w in workers if w.role == "prefill"]
        assert any(placement.prefill is w for w in prefills)
        assert placement.decode.role == "decode"
        assert placement.prefill.layout_hash == placement.decode.layout_hash
        assert placement.prefill.worker_id not in avoid or avoid.issuperset(w.worker_id for w in prefills)


@EVERY
@settings(max_examples=100, deadline=None)
@given(scene=clusters())
def test_a_policy_repeats_itself_and_predicts_as_all_do(
    name: str, scene: tuple[list[WorkerHandle], PrefixIndex, set[str], Demand]
) -> None:
    workers, prefixes, avoid, request = scene
    policy = policy_of(name, prefixes)
    placement = policy.place(request, workers, avoid)
    assert placement == policy.place(request, workers, avoid)
    assert placement == policy_of(name, prefixes).place(request, workers, avoid)
    if placement is not None:
        predictor = Predictor(prefixes, RouterConfig().expected_output_tokens)
        assert placement == predictor.forecast(request).of(placement.prefill, placement.decode)


def chosen(name: str, workers: list[WorkerHandle], request: Demand | None = None) -> Placement:
    placement = policy_of(name, PrefixIndex(10)).place(request or demand(), workers)
    assert placement is not None
    return placement


@EVERY
def test_equals_are_taken_in_the_order_of_the_workers(name: str) -> None:
    pools = [worker(f"{role[0]}{i}", role) for role in ("prefill", "decode") for i in range(3)]
    assert names(chosen(name, pools)) == ("p0", "d0")
    assert names(chosen(name, pools[::-1])) == ("p2", "d2")
    assert names(chosen(name, [worker(f"c{i}", "colocated") for i in (1, 0)])) == ("-", "c1")


@EVERY
def test_a_decode_worker_that_nobody_can_hand_over_to_serves_alone(name: str) -> None:
    assert names(chosen(name, [worker("p0", "prefill", layout="old"), worker("d0", "decode")])) == ("-", "d0")


@EVERY
def test_lengths_and_hand_offs_that_are_observed_change_the_prediction(name: str) -> None:
    policy = policy_of(name, PrefixIndex(10))
    workers = [worker("p0", "prefill"), worker("d0", "decode")]
    before = policy.place(demand(), workers)
    for _ in range(20):
        policy.observe_completion(4)
        policy.observe_handoff(0.5)
    after = policy.place(demand(), workers)
    assert before is not None and after is not None  # noqa: PT018
    assert before.tpot_ms is not None and after.tpot_ms is not None  # noqa: PT018
    assert after.tpot_ms > before.tpot_ms + 10.0  # a hand-off of 0.5 s over fewer tokens


@pytest.mark.parametrize(("name", "expected"), [("goodput", "d0"), ("distserve", "p0"), ("splitwise", "p1")])
def test_a_gateway_places_by_the_policy_that_is_configured(name: str, expected: str) -> None:
    """Few tokens stay on the decode worker; one prefill worker has few requests and one few tokens."""

    async def main() -> None:
        with fake_cluster(prefill=2, prompt_s=0.01, step_s=0.01) as cluster:
            for worker_id, requests, tokens in (("p0", 1, 3000), ("p1", 5, 500)):
                cluster.workers[worker_id].load.waiting_requests = requests
                cluster.workers[worker_id].load.waiting_tokens = tokens
            async with cluster.router(policy=name) as router:
                await until(lambda: sum(h.waiting_tokens > 0 for h in router.pool.ready()) == 2)
                outcome = await generate(router, token_request([1, 2, 3]))
        assert outcome.last.stages.prefill_worker == expected

    run_virtually(main())

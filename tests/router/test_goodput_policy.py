"""GoodputPolicy: which workers a request goes to, and what is predicted for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from diphase.proto import worker_pb2 as wpb
from diphase.proto.block_hash import block_hashes, root_hash
from diphase.proto.slo import Slo
from diphase.router.config import RouterConfig
from diphase.router.forecast import Predictor
from diphase.router.goodput_policy import GoodputPolicy
from diphase.router.placement import Demand, Placement
from diphase.router.prefix_index import PrefixIndex
from diphase.router.worker_handle import WorkerHandle

from .placements import PROMPT, demand, names, worker

MAX_PREFIX_BLOCKS = 10_000


def policy(prefixes: PrefixIndex | None = None, local: int = 64) -> GoodputPolicy:
    config = RouterConfig(local_prefill_tokens=local, expected_output_tokens=64)
    return GoodputPolicy(prefixes or PrefixIndex(MAX_PREFIX_BLOCKS), config)


def place(workers: Sequence[WorkerHandle], request: Demand | None = None, **options: object) -> Placement:
    placement = policy(**options).place(request or demand(), workers)  # type: ignore[arg-type]
    assert placement is not None
    return placement


def test_the_prefill_worker_with_the_shorter_queue_is_taken() -> None:
    workers = [
        worker("p0", "prefill", waiting_requests=2, waiting_tokens=800),
        worker("p1", "prefill", waiting_requests=1, waiting_tokens=100),
        worker("d0", "decode"),
    ]
    assert names(place(workers)) == ("p1", "d0")


def test_the_decode_worker_with_the_shorter_step_is_taken() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", running=12, running_context=9000),
        worker("d1", "decode", running=3, running_context=1000),
    ]
    assert names(place(workers)) == ("p0", "d1")


def test_a_full_kv_pool_is_avoided() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", blocks_free=5, blocks_running=995),
        worker("d1", "decode", running=6, running_context=3000, blocks_free=600, blocks_running=400),
    ]
    assert names(place(workers)) == ("p0", "d1")


def test_blocks_of_hand_offs_on_their_way_come_back_as_those_of_running_sequences_do() -> None:
    reserved, running = (
        place([worker("p0", "prefill"), full])
        for full in (
            worker("d0", "decode", blocks_free=5, blocks_reserved=995),
            worker("d0", "decode", blocks_free=5, blocks_running=995),
        )
    )
    assert reserved.tpot_ms == running.tpot_ms


def test_blocks_that_a_hand_off_has_are_not_taken_from_the_free_ones_again() -> None:
    def memory(free: int, reserved: int, tokens: int) -> float:
        handle = worker("d0", "decode", blocks_free=free, blocks_reserved=reserved)
        handle.expect_sequence("a", tokens)
        forecast = Predictor(PrefixIndex(MAX_PREFIX_BLOCKS), 64).forecast(demand())
        return forecast.decode_side(handle).memory

    assert memory(1000, 0, 800) == memory(950, 50, 800)
    assert memory(950, 50, 1600) == pytest.approx(memory(950, 50, 800) - 0.05)


def test_cached_blocks_count_as_free() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", blocks_free=0, blocks_cached=900, blocks_running=100),
        worker("d1", "decode", blocks_free=300, blocks_running=700),
    ]
    assert names(place(workers)) == ("p0", "d0")


def test_a_cached_prefix_outweighs_a_short_queue_but_not_a_long_one() -> None:
    prefixes = PrefixIndex(MAX_PREFIX_BLOCKS)
    hashes = block_hashes(PROMPT, 16, root_hash("L"))
    prefixes.snapshot("p1", 0, hashes)
    idle = [worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode")]
    placement = place(idle, prefixes=prefixes)
    assert names(placement) == ("p1", "d0")
    assert placement.uncached_tokens == 1  # the last token is always computed
    busy = worker("p1", "prefill", waiting_requests=1, waiting_tokens=200)
    assert names(place([idle[0], busy, idle[2]], prefixes=prefixes)) == ("p1", "d0")
    buried = worker("p1", "prefill", waiting_requests=4, waiting_tokens=2000)
    assert names(place([idle[0], buried, idle[2]], prefixes=prefixes)) == ("p0", "d0")


def test_the_prediction_is_the_models() -> None:
    request = demand(slo=Slo(ttft_ms=1000, tpot_ms=100))
    workers = [
        worker("p0", "prefill", waiting_requests=1, waiting_tokens=100),
        worker("d0", "decode", running=4, running_context=2000),
    ]
    placement = place(workers, request)
    assert placement.ttft_ms == pytest.approx(10 + 0.5 * 500, rel=0.03)
    context = 2000 + 400 + 32
    assert placement.tpot_ms == pytest.approx(10 + 5 + 5e-3 * context, rel=0.03)
    assert placement.informed


def test_a_short_prompt_may_stay_on_the_decode_worker_and_a_long_one_not() -> None:
    prefill = worker("p0", "prefill", waiting_requests=3, waiting_tokens=1200)
    workers = [prefill, worker("d0", "decode")]
    assert names(place(workers, demand(PROMPT[:64]))) == ("-", "d0")
    assert names(place(workers, demand(PROMPT[:65]))) == ("p0", "d0")


def test_a_mostly_cached_prompt_may_stay_on_the_decode_worker() -> None:
    prefixes = PrefixIndex(MAX_PREFIX_BLOCKS)
    prefixes.snapshot("d0", 0, block_hashes(PROMPT, 16, root_hash("L")))
    workers = [worker("p0", "prefill"), worker("d0", "decode")]
    assert names(place(workers, prefixes=prefixes)) == ("-", "d0")


def test_without_a_prefill_pool_decode_workers_compute_prompts() -> None:
    assert names(place([worker("d0", "decode")])) == ("-", "d0")


def test_a_prompt_on_the_decode_worker_takes_as_many_steps_as_its_chunks_are() -> None:
    workers = [worker("d0", "decode", running=4, running_context=400)]
    assert place(workers, local=1024).ttft_ms == place(workers, local=0).ttft_ms > 4 * 10  # four chunks


def test_without_a_decode_worker_nothing_is_possible() -> None:
    assert policy().place(demand(), [worker("p0", "prefill")]) is None
    assert policy().place(demand(), []) is None


def test_a_colocated_worker_takes_whole_requests() -> None:
    workers = [
        worker("c0", "colocated", running=8, running_context=4000, waiting_requests=1, waiting_tokens=300),
        worker("c1", "colocated", running=2, running_context=500),
    ]
    placement = place(workers)
    assert names(placement) == ("-", "c1")
    assert placement.ttft_ms > 4 * 12  # four chunks, each beside a decode step


def test_workers_of_different_layouts_never_pair() -> None:
    workers = [
        worker("p0", "prefill", layout="old"),
        worker("p1", "prefill", layout="new", waiting_requests=9, waiting_tokens=3000),
        worker("d0", "decode", layout="new"),
    ]
    assert names(place(workers)) == ("p1", "d0")


def test_a_decode_worker_that_nobody_can_hand_over_to_computes_the_prompt() -> None:
    old, new = worker("p0", "prefill", layout="old"), worker("d0", "decode", layout="new")
    assert names(place([old, new])) == ("-", "d0")


def test_a_colocated_worker_takes_no_hand_off() -> None:
    workers = [worker("p0", "prefill"), worker("c0", "colocated")]
    assert names(place(workers)) == ("-", "c0")
    busy = worker("d0", "decode", running=15, running_context=14_000)
    assert names(place([workers[0], busy])) == ("p0", "d0")


def test_workers_to_avoid_are_used_only_without_others() -> None:
    workers = [worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode")]
    placement = policy().place(demand(), workers, {"p0", "d0"})
    assert placement is not None
    assert names(placement) == ("p1", "d0")


def test_equal_workers_are_taken_in_their_fixed_order() -> None:
    workers = [worker(name, "prefill") for name in ("p0", "p1", "p2")] + [
        worker(name, "decode") for name in ("d0", "d1")
    ]
    assert {names(place(workers)) for _ in range(5)} == {("p0", "d0")}


def test_placements_that_no_report_includes_yet_count_as_load() -> None:
    chooser = policy()
    workers = [worker(name, "prefill") for name in ("p0", "p1", "p2")] + [
        worker(name, "decode") for name in ("d0", "d1")
    ]
    taken = []
    for i in range(6):
        placement = chooser.place(demand(), workers)
        assert placement is not None
        placement.first.expect_prompt(placement.uncached_tokens, now=0.0)
        placement.decode.expect_sequence(f"r{i}", 400)
        taken.append(names(placement))
    assert sorted(prefill for prefill, _ in taken) == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert sorted(decode for _, decode in taken) == ["d0", "d0", "d0", "d1", "d1", "d1"]


def test_a_report_replaces_what_was_expected() -> None:
    handle = worker("p0", "prefill")
    handle.expect_prompt(100, now=1.0)
    handle.expect_prompt(50, now=2.0)
    assert (handle.waiting_requests, handle.waiting_tokens) == (2, 150)
    handle.on_load(wpb.Load(waiting_requests=1, waiting_tokens=90), now=1.5)
    assert (handle.waiting_requests, handle.waiting_tokens) == (2, 140)


def test_a_full_batch_lengthens_the_prediction() -> None:
    free = place([worker("p0", "prefill"), worker("d0", "decode", running=4, max_running=8)])
    full = place([worker("p0", "prefill"), worker("d0", "decode", running=4, max_running=4)])
    assert free.tpot_ms is not None
    assert full.tpot_ms is not None
    assert full.tpot_ms > free.tpot_ms


def test_what_cannot_meet_the_slo_is_said_so() -> None:
    workers = [worker("p0", "prefill"), worker("d0", "decode")]
    assert place(workers).meets(Slo())
    tight = place(workers, demand(slo=Slo(ttft_ms=50)))
    assert not tight.meets(Slo(ttft_ms=50))
    assert tight.slacks[0] < 0


def test_one_token_has_no_tpot() -> None:
    placement = place([worker("p0", "prefill"), worker("d0", "decode")], demand(new=1))
    assert placement.tpot_ms is None


def test_hand_offs_that_took_long_favour_one_worker() -> None:
    chooser = policy()
    workers = [worker("p0", "prefill"), worker("d0", "decode")]
    for _ in range(20):
        chooser.observe_handoff(2.0)
        chooser.observe_completion(10)
    placement = chooser.place(demand(PROMPT[:32]), workers)
    assert placement is not None
    assert names(placement) == ("-", "d0")

"""SplitwisePolicy: the shortest queues of tokens, and the mixed pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diphase.router.config import RouterConfig
from diphase.router.placement import Demand
from diphase.router.prefix_index import PrefixIndex
from diphase.router.splitwise_policy import SplitwisePolicy
from diphase.router.worker_handle import WorkerHandle

from .placements import demand, names, worker

CROWD: dict[str, Any] = {"waiting_requests": 2, "waiting_tokens": 8000}
"""With a prompt of 400 tokens more than 8,192 would be pending."""
FULL: dict[str, Any] = {"blocks_free": 20, "blocks_running": 980}
"""320 tokens: too few for 400 and 64 more."""


def place(workers: Sequence[WorkerHandle], request: Demand | None = None) -> tuple[str, str]:
    placement = SplitwisePolicy(PrefixIndex(10), RouterConfig()).place(request or demand(), workers)
    assert placement is not None
    return names(placement)


def test_the_prompt_joins_the_queue_with_the_fewest_tokens() -> None:
    workers = [
        worker("p0", "prefill", waiting_requests=1, waiting_tokens=3000),
        worker("p1", "prefill", waiting_requests=5, waiting_tokens=500),
        worker("d0", "decode"),
    ]
    assert place(workers) == ("p1", "d0")


def test_the_tokens_go_where_the_least_memory_is_taken_or_promised() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", running=2, blocks_free=500),
        worker("d1", "decode", running=9, blocks_free=300, blocks_cached=400),  # cached is not taken
        worker("d2", "decode", blocks_free=900),
    ]
    workers[3].expect_sequence("a", 3200)
    assert place(workers) == ("p0", "d1")


def test_what_a_hand_off_has_been_granted_is_taken_once() -> None:
    granted, promised = worker("d0", "decode", blocks_free=800, blocks_reserved=200), worker("d1", "decode")
    for handle, tokens in ((granted, 3200), (promised, 3216)):
        handle.expect_sequence("a", tokens)
    assert place([worker("p0", "prefill"), promised, granted]) == ("p0", "d0")


def test_a_crowded_prompt_pool_sends_both_phases_to_a_colocated_worker() -> None:
    pools = [worker("p0", "prefill", **CROWD), worker("d0", "decode")]
    mixed = worker("c0", "colocated", running=6, running_context=3000, blocks_free=700)
    assert place([*pools, mixed]) == ("-", "c0")
    roomy = worker("p1", "prefill", waiting_requests=2, waiting_tokens=7792)  # exactly 8,192 with the prompt
    assert place([*pools, roomy, mixed]) == ("p1", "d0")


def test_a_prompt_that_need_not_queue_is_never_too_long() -> None:
    busy = worker("p0", "prefill", waiting_requests=0, waiting_tokens=8190, running=1)
    assert place([busy, worker("d0", "decode"), worker("c0", "colocated")]) == ("p0", "d0")


def test_a_decode_worker_is_borrowed_when_the_mixed_pool_has_no_room() -> None:
    pools = [
        worker("p0", "prefill", **CROWD),
        worker("d0", "decode", blocks_free=400),
        worker("d1", "decode"),
    ]
    assert place(pools) == ("-", "d1")
    assert place([*pools, worker("c0", "colocated", **CROWD)]) == ("-", "d1")
    assert place([*pools, worker("c0", "colocated", **FULL)]) == ("-", "d1")


def test_a_borrowed_decode_worker_is_mixed_while_it_has_prompts() -> None:
    borrowed = worker("d0", "decode", waiting_requests=1, waiting_tokens=300)
    free = worker("d1", "decode", running=5, blocks_free=500)
    crowded, roomy = worker("p0", "prefill", **CROWD), worker("p0", "prefill")
    assert place([crowded, borrowed, free]) == ("-", "d0")  # the next prompts go there, too
    assert place([roomy, borrowed, free]) == ("p0", "d1")  # and no tokens
    full = worker("d1", "decode", **FULL)
    assert place([roomy, borrowed, full]) == ("p0", "d0")  # while the token pool has room
    borrowed.load.waiting_requests = borrowed.load.waiting_tokens = 0
    assert place([roomy, borrowed, free]) == ("p0", "d0")  # back in it


def test_a_full_token_pool_sends_both_phases_to_a_colocated_worker() -> None:
    pools = [worker("p0", "prefill"), worker("d0", "decode", **FULL)]
    assert place([*pools, worker("c0", "colocated", blocks_free=500)]) == ("-", "c0")
    assert place([*pools, worker("c0", "colocated", **FULL)]) == ("p0", "d0")  # the hand-off waits for room
    assert place([*pools, worker("c0", "colocated", **CROWD)]) == ("p0", "d0")


def test_the_most_that_a_request_may_become_has_to_fit() -> None:
    pools = [worker("p0", "prefill"), worker("d0", "decode", blocks_free=50), worker("c0", "colocated")]
    assert place(pools, demand(new=399)) == ("p0", "d0")
    assert place(pools, demand(new=400)) == ("-", "c0")


def test_prompts_that_wait_on_a_mixed_worker_will_take_memory() -> None:
    pools = [worker("p0", "prefill"), worker("d0", "decode", **FULL)]
    queue = worker("c0", "colocated", waiting_requests=1, waiting_tokens=6000)
    assert place([*pools, queue, worker("c1", "colocated", blocks_free=800)]) == ("-", "c1")


def test_in_a_pool_of_several_sizes_the_request_has_to_fit() -> None:
    small = worker("d0", "decode", blocks_total=30, blocks_free=10)
    large = worker("d1", "decode", blocks_free=500)
    assert place([worker("p0", "prefill"), small, large]) == ("p0", "d1")
    assert place([worker("p0", "prefill", **CROWD), small, large]) == ("-", "d1")


def test_a_hand_off_without_room_waits_where_the_least_memory_is_taken() -> None:
    fuller = worker("d0", "decode", blocks_free=10)
    assert place([worker("p0", "prefill"), fuller, worker("d1", "decode", **FULL)]) == ("p0", "d1")


def test_without_room_anywhere_the_least_loaded_serves_both_phases() -> None:
    workers = [
        worker("p0", "prefill", **CROWD),
        worker("c0", "colocated", waiting_requests=9, waiting_tokens=9000),
        worker("d0", "decode", **FULL),
    ]
    assert place(workers) == ("-", "d0")
    workers[2].load.waiting_tokens = 9500
    assert place(workers) == ("-", "c0")


def test_a_worker_that_has_not_reported_yet_has_room() -> None:
    unknown = worker("d0", "decode", blocks_total=0, blocks_free=0)
    assert place([worker("p0", "prefill"), unknown, worker("c0", "colocated")]) == ("p0", "d0")


def test_the_decode_worker_has_the_layout_of_the_prefill_worker() -> None:
    workers = [
        worker("p0", "prefill", layout="alone"),
        worker("p1", "prefill", layout="new", waiting_requests=1, waiting_tokens=900),
        worker("d0", "decode", layout="old"),
        worker("d1", "decode", layout="new", blocks_free=400),
    ]
    assert place(workers) == ("p1", "d1")

"""DistServePolicy: the fewest requests in each pool."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diphase.proto.block_hash import block_hashes, root_hash
from diphase.router.config import RouterConfig
from diphase.router.distserve_policy import DistServePolicy
from diphase.router.placement import Demand
from diphase.router.prefix_index import PrefixIndex
from diphase.router.worker_handle import WorkerHandle

from .placements import PROMPT, demand, names, worker


def place(
    workers: Sequence[WorkerHandle], request: Demand | None = None, avoid: Collection[str] = ()
) -> tuple[str, str]:
    placement = DistServePolicy(PrefixIndex(1000), RouterConfig()).place(request or demand(), workers, avoid)
    assert placement is not None
    return names(placement)


def test_the_prefill_worker_with_the_fewest_requests_is_taken_whatever_their_lengths() -> None:
    workers = [
        worker("p0", "prefill", waiting_requests=2, waiting_tokens=20),
        worker("p1", "prefill", waiting_requests=1, waiting_tokens=9000),
        worker("d0", "decode"),
    ]
    assert place(workers) == ("p1", "d0")


def test_what_a_prefill_worker_computes_counts_and_what_it_only_holds_does_not() -> None:
    computing = worker("p0", "prefill", running=2)
    holding = worker("p1", "prefill", running=1, handoffs=9)
    assert place([computing, holding, worker("d0", "decode")]) == ("p1", "d0")


def test_the_decode_worker_with_the_fewest_sequences_is_taken_whatever_their_contexts() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", running=3, running_context=30),
        worker("d1", "decode", running=2, running_context=9000, blocks_free=10),
    ]
    assert place(workers) == ("p0", "d1")


def test_sequences_that_wait_and_those_on_their_way_count() -> None:
    others = worker("d0", "decode", running=1, handoffs=3)  # another gateway's
    waits = worker("d1", "decode", running=1, waiting_requests=2)
    comes = worker("d2", "decode", running=1)
    comes.expect_sequence("a", 10)
    assert place([worker("p0", "prefill"), others, waits, comes]) == ("p0", "d2")


def test_submits_that_no_report_includes_count() -> None:
    first, second = worker("p0", "prefill"), worker("p1", "prefill")
    first.expect_prompt(1, now=0.0)
    assert place([first, second, worker("d0", "decode")]) == ("p1", "d0")


def test_a_short_or_cached_prompt_is_computed_in_the_prefill_pool_too() -> None:
    workers = [worker("p0", "prefill", waiting_requests=5, waiting_tokens=3000), worker("d0", "decode")]
    assert place(workers, demand(PROMPT[:1])) == ("p0", "d0")
    prefixes = PrefixIndex(1000)
    prefixes.snapshot("d0", 0, block_hashes(PROMPT, 16, root_hash("L")))
    placement = DistServePolicy(prefixes, RouterConfig()).place(demand(), workers)
    assert placement is not None
    assert names(placement) == ("p0", "d0")


def test_the_decode_worker_has_the_layout_of_the_prefill_worker() -> None:
    workers = [
        worker("p0", "prefill", layout="alone"),
        worker("p1", "prefill", layout="new", waiting_requests=4),
        worker("d0", "decode", layout="old"),
        worker("d1", "decode", layout="new", running=9),
    ]
    assert place(workers) == ("p1", "d1")


def test_colocated_workers_serve_where_there_is_no_pair() -> None:
    colocated = [worker("c0", "colocated", running=4), worker("c1", "colocated", running=1)]
    assert place(colocated) == ("-", "c1")
    assert place([worker("p0", "prefill"), *colocated]) == ("-", "c1")
    assert place([*colocated, worker("d0", "decode")]) == ("-", "c1")  # not made for prompts
    assert place([worker("p0", "prefill"), *colocated, worker("d0", "decode", running=9)]) == ("p0", "d0")

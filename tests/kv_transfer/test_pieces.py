"""The small parts: digests, push plans, configuration, the registry."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from diphase.kv_transfer import wire
from diphase.kv_transfer.admission import REMEMBERED, NewestAttempts, check_reservation
from diphase.kv_transfer.base import Done, Event, Region, TransportContext
from diphase.kv_transfer.byte_worker import ByteWorker
from diphase.kv_transfer.config import TRANSPORTS, KvTransferConfig
from diphase.kv_transfer.counters import MAX_PEERS, HandoffCollector, HandoffCounters
from diphase.kv_transfer.pool_bytes import PoolBytes
from diphase.kv_transfer.push_plan import advance, pieces, push_stops
from diphase.kv_transfer.registry import TransportSet, load_factory, open_transports
from diphase.kv_transfer.transports.local import LocalHub, LocalTransport
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import (
    ConfigError,
    DiphaseError,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    TransferError,
)
from diphase.proto.handoff_pb2 import Reserve
from diphase.proto.ids import HandoffKey
from diphase.proto.kv_layout import UNSHARDED, KvLayout, Sharding
from prometheus_client import CollectorRegistry

LAYOUT = KvLayout(model="test", num_layers=4, num_kv_heads=2, head_dim=4, block_size=4, dtype="bf16")


def pool(sharding: Sharding = UNSHARDED, num_blocks: int = 30) -> PoolBytes:
    ranks = [sharding.rank_layout(LAYOUT, rank) for rank in range(sharding.num_ranks)]
    return PoolBytes(
        LAYOUT, sharding, [memoryview(bytearray(num_blocks * rank.block_bytes)) for rank in ranks]
    )


@pytest.mark.parametrize("threaded", [True, False])
def test_results_come_back_with_their_tickets_in_order(threaded: bool) -> None:
    woken = threading.Semaphore(0)
    worker = ByteWorker(woken.release, threaded=threaded)
    for ticket in range(50):
        worker.submit(ticket, partial(pow, ticket, 2))
    results: list[Any] = []
    while len(results) < 50:
        assert woken.acquire(timeout=20.0)
        results.extend(worker.poll())
    assert results == [(ticket, ticket**2) for ticket in range(50)]
    worker.close()
    worker.close()


def test_a_digest_sees_every_byte() -> None:
    bytes_ = pool(num_blocks=1)
    size = bytes_.size(1, 4)
    data = bytearray(size)
    seen = set(bytes_.digests([0], 0, 4))
    assert seen == {xxhash.xxh3_64_intdigest(data)}
    for i in range(size):
        data[i] ^= 0x10
        bytes_.scatter(memoryview(data), [0], 0, 4)
        seen.update(bytes_.digests([0], 0, 4))
        data[i] ^= 0x10
    assert len(seen) == size + 1


@pytest.mark.parametrize("sharding", [UNSHARDED, Sharding(tp=2), Sharding(tp=4), Sharding(tp=2, pp=3)])
def test_bytes_and_digests_are_the_same_however_a_pool_is_cut(sharding: Sharding) -> None:
    whole, cut = pool(), pool(sharding)
    blocks, elsewhere = [3, 4, 9, 0], [7, 1, 2, 29]
    data = memoryview(random.Random(5).randbytes(whole.size(4, 3)))
    whole.scatter(data, blocks, 1, 3)
    cut.scatter(data, elsewhere, 1, 3)
    back = bytearray(len(data))
    cut.gather(memoryview(back), elsewhere, 1, 3)
    assert back == data
    assert cut.digests(elsewhere, 1, 3) == whole.digests(blocks, 1, 3)
    assert cut.digests(elsewhere, 1, 2) == whole.digests(blocks, 1, 2)
    assert cut.digests(elsewhere, 0, 4) != cut.digests(blocks, 0, 4)


@pytest.mark.parametrize(
    ("num_layers", "layers_per_push", "last", "stops"),
    [
        (30, 10, False, (10, 20, 30)),
        (30, 10, True, (10, 20, 26, 28, 29, 30)),
        (4, 3, False, (3, 4)),
        (4, 3, True, (3, 4)),
        (4, 2, True, (2, 3, 4)),
        (3, 1, True, (1, 2, 3)),
        (30, 30, True, (30,)),
        (2, 99, True, (2,)),
    ],
)
def test_groups_of_layers_get_smaller_towards_the_end_of_a_prompt(
    num_layers: int, layers_per_push: int, last: bool, stops: tuple[int, ...]
) -> None:
    assert push_stops(num_layers, layers_per_push, last=last) == stops


@pytest.mark.parametrize("seed", range(50))
def test_pieces_cover_what_is_ready_and_not_pushed_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 8)
    pushed = [rng.randint(0, 5) for _ in range(layers)]
    ready = [rng.randint(0, 9) for _ in range(layers)]
    if rng.random() < 0.5:
        pushed, ready = [pushed[0]] * layers, [ready[0]] * layers
    limit = rng.randint(1, 20)
    found = list(pieces(ready, pushed, limit))
    cells = [
        cell
        for piece in found
        for cell in itertools.product(
            range(piece.first_layer, piece.first_layer + piece.num_layers),
            range(piece.first_block, piece.first_block + piece.num_blocks),
        )
    ]
    assert sorted(cells) == [(i, b) for i in range(layers) for b in range(pushed[i], ready[i])]
    assert all(piece.num_blocks * piece.num_layers <= max(limit, piece.num_layers) for piece in found)


def test_progress_of_layers_never_goes_back() -> None:
    assert advance((3, 3, 3, 3), 5, 1, 2) == (3, 5, 5, 3)
    assert advance((5, 5), 4, 0, 2) == (5, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"transport": ""},
        {"host": ""},
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"tcp_sockets": 0},
        {"tcp_sockets": 17},
        {"layers_per_push": 0},
        {"layerwise_tokens": -1},
        {"max_push_bytes": 0},
        {"lease_s": 0.0},
        {"progress_timeout_s": -1.0},
        {"tail_timeout_s": float("nan")},
        {"reserve_timeout_s": 1e9},
        {"staging_mib": 8},
        {"staging_window_mib": 65},
        {"codecs": ("int8",), "staging": "never"},
        {"transport": "pigeon"},
        {"codecs": ("fp8",), "staging_mib": 0},
    ],
)
def test_configuration_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        KvTransferConfig(**wrong)


def region(size: int = 64) -> Region:
    return Region(buffer=memoryview(bytearray(size)))


def test_an_unknown_transport_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"pigeon.*use one of auto, cuda_ipc, shm, nixl, nccl, tcp"):
        load_factory("pigeon")
    assert list(TRANSPORTS) == ["local", "cuda_ipc", "shm", "nixl", "nccl", "tcp"]
    for path in TRANSPORTS.values():
        module, _, name = path.partition(":")
        assert getattr(importlib.import_module(module), name)


def test_a_transport_whose_library_is_missing_is_skipped_by_auto_and_an_error_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diphase")
    (tmp_path / "transport_without_library.py").write_text("import cupy.cuda\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", None)
    offered = {"nccl": "transport_without_library:Nccl", **TRANSPORTS}
    monkeypatch.setattr("diphase.kv_transfer.registry.TRANSPORTS", offered)
    clock = MonotonicClock()
    transports = open_transports(KvTransferConfig(), incarnation="a", pools=[region()], clock=clock)
    assert transports.names == ["tcp"]
    transports.close()
    assert "transport_not_installed name=nccl" in caplog.text
    with pytest.raises(ConfigError, match=r"'nccl' needs cupy.*pip install diphase\[cuda\]"):
        open_transports(KvTransferConfig(transport="nccl"), incarnation="a", pools=[region()], clock=clock)


def test_a_transport_whose_module_imports_what_nobody_has_is_a_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diphase.kv_transfer.registry.TRANSPORTS", {"x": "diphase.kv_transfer.no_such:X"})
    with pytest.raises(ModuleNotFoundError):
        load_factory("x")


def test_transports_that_cannot_work_are_left_out_and_a_wanted_one_is_an_error() -> None:
    clock = MonotonicClock()
    transports = open_transports(KvTransferConfig(), incarnation="a", pools=[region()], clock=clock)
    assert transports.names == ["tcp"]  # no memfd
    transports.close()
    with pytest.raises(TransferError, match=r"'shm' does not work on this machine \(shm: .* memfd"):
        open_transports(KvTransferConfig(transport="shm"), incarnation="a", pools=[region()], clock=clock)


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl"])
def test_transports_for_gpus_say_what_is_missing(name: str) -> None:
    """Which depends on the machine: the library, the driver, or that the pool is not a GPU's."""
    if importlib.util.find_spec("cupy") is None:
        wanted: type[DiphaseError] = ConfigError
        says = rf"'{name}' needs cupy.*run `pip install diphase\[cuda\]`"
    else:
        wanted, says = (
            TransferError,
            rf"\({name}: (no CUDA device is|the region is memory of the host|CuPy finds)",
        )
    with pytest.raises(wanted, match=says):
        open_transports(
            KvTransferConfig(transport=name), incarnation="a", pools=[region()], clock=MonotonicClock()
        )


def test_tcp_makes_as_many_connections_as_configured() -> None:
    ends = []
    for name in ("a", "b"):
        config = KvTransferConfig(transport="tcp", tcp_sockets=3)
        ends.append(
            open_transports(config, incarnation=name, pools=[region(8 << 20)], clock=MonotonicClock())
        )
    source, target = (each["tcp"] for each in ends)
    woken = threading.Event()
    ends[0].listen(woken.set)
    target.admit("a")
    source.connect(target.endpoint(), 5.0)
    segments = np.array([[0, 0, 0, 0, 8 << 20]], dtype=np.int64)
    transfer = source.write("b", segments, b"", 20.0)
    events: list[Event] = []
    while not events:
        assert woken.wait(20.0)
        woken.clear()
        events.extend(source.poll())
    assert events == [Done(transfer)]
    peer = source._peers._peers["b"]  # type: ignore[attr-defined]
    assert len(peer.writers) == 3
    for each in ends:
        each.close()


def test_the_transport_of_one_process_is_tried_only_where_there_is_a_hub(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="diphase")
    for hub, wanted in ((LocalHub(), True), (None, False)):
        transports = open_transports(
            KvTransferConfig(), incarnation="a", pools=[region()], clock=MonotonicClock(), hub=hub
        )
        assert ("local" in transports.names) is wanted
        transports.close()
    assert "name=local" not in caplog.text


def test_the_transport_of_one_process_cannot_be_configured() -> None:
    with pytest.raises(ConfigError, match=r'"local" joins roles of one process.*use "auto"'):
        KvTransferConfig(transport="local")


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_ours_is_an_error_that_names_the_key(transport: str, host: str) -> None:
    config = KvTransferConfig(transport=transport, host=host)
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=rf"kv_transfer\.host = '{host}'"):
        open_transports(config, incarnation="a", pools=[region()], clock=MonotonicClock())
    assert set(threading.enumerate()) == before


def local_set(hub: LocalHub, incarnation: str) -> TransportSet:
    context = TransportContext(incarnation=incarnation, wake=lambda: None, clock=MonotonicClock(), hub=hub)
    return TransportSet({"local": LocalTransport(context)}, [region()], byte_thread=False)


def test_the_choice_names_why_nothing_fits() -> None:
    here = local_set(LocalHub(), "a")
    elsewhere = local_set(LocalHub(), "b")
    with pytest.raises(TransferError, match="another process"):
        here.choose(elsewhere.endpoints())
    with pytest.raises(TransferError, match="does not offer"):
        here.choose({})
    with pytest.raises(TransferError, match="tcp is not open"):
        here.choose(here.endpoints(), "tcp")
    assert here.choose(here.endpoints()) == "local"


def test_reservations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        check_reservation(Reserve(num_tokens=0), LAYOUT, 10)
    with pytest.raises(InvalidRequest):
        check_reservation(Reserve(num_tokens=7, block_hashes=[b"a" * 16] * 2), LAYOUT, 10)
    with pytest.raises(PromptTooLong, match=r"11 KV blocks.*10"):
        check_reservation(Reserve(num_tokens=41), LAYOUT, 10)
    check_reservation(Reserve(num_tokens=40), LAYOUT, 10)


def test_attempts_are_remembered_but_not_for_ever() -> None:
    attempts = NewestAttempts()
    assert attempts.begin(HandoffKey("r", 0)) is None
    assert attempts.begin(HandoffKey("r", 2)) == HandoffKey("r", 0)
    for attempt in (0, 1, 2):
        with pytest.raises(TransferError, match="stale"):
            attempts.begin(HandoffKey("r", attempt))
    attempts.ready(HandoffKey("r", 2))
    assert attempts.was_ready(HandoffKey("r", 2))
    for i in range(REMEMBERED):
        attempts.begin(HandoffKey(f"other{i}", 0))
    assert attempts.begin(HandoffKey("r", 0)) is None


def test_what_a_job_raises_is_its_result_unless_it_is_a_fault_of_ours() -> None:
    woken = threading.Semaphore(0)
    worker = ByteWorker(woken.release)
    error = TransferError("malformed")

    def refuse() -> None:
        raise error

    def crash() -> None:
        raise ZeroDivisionError

    worker.submit("a", refuse)
    assert woken.acquire(timeout=20.0)
    assert worker.poll() == [("a", error)]
    worker.submit("b", crash)
    assert woken.acquire(timeout=20.0)
    with pytest.raises(InternalError, match="crashed: ZeroDivisionError"):
        worker.poll()
    worker.close()


def test_a_tag_is_twelve_bytes_and_anything_else_is_none() -> None:
    tag = wire.part_tag(2**64 - 1, 2**32 - 1)
    assert len(tag) == 12
    assert wire.read_tag(tag) == (2**64 - 1, 2**32 - 1)
    assert wire.read_tag(tag[:-1]) is wire.read_tag(tag + b"x") is wire.read_tag(b"") is None


def test_a_peer_that_was_only_dialled_is_not_among_the_figures() -> None:
    counters = HandoffCounters()
    counters.peer("", "d0")
    counters.peer("shm", "d0").transfers += 1
    counters.peer("", "d1").failures["peer_lost"] += 1
    figures = counters.figures(outgoing=True)
    assert [(each.transport, each.peer) for each in figures] == [("shm", "d0"), ("none", "d1")]


def test_prometheus_reads_the_counters_as_they_are_when_it_asks() -> None:
    counters = HandoffCounters()
    registry = CollectorRegistry()
    registry.register(HandoffCollector(counters, lambda: {"lent": 4096}))
    counters.peer("tcp", "d0").failures["peer_lost"] += 2
    counters.refused["stale"] += 1
    counters.peer("tcp", "d0").quarantined_blocks += 7
    counters.peer("", "d1").wire_s += 0.5
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }
    assert {name: value for name, value in values.items() if value} == {
        ("diphase_failed_handoffs_total", "tcp", "d0", "peer_lost"): 2,
        ("diphase_refused_handoff_messages_total", "stale"): 1,
        ("diphase_kv_transfer_quarantined_blocks_total", "tcp", "d0"): 7,
        ("diphase_kv_transfer_wire_seconds_total", "none", "d1"): 0.5,
        ("diphase_kv_staging_bytes", "lent"): 4096,
    }
    assert values["diphase_digest_mismatches_total",] == 0
    assert counters.total().quarantined_blocks == 7
    assert counters.total().failures == {"peer_lost": 2}


def test_of_too_many_peers_the_one_unused_longest_is_forgotten() -> None:
    counters = HandoffCounters()
    kept = counters.peer("shm", "first")
    for i in range(MAX_PEERS):
        counters.peer("shm", "first")
        counters.peer("shm", f"other{i}")
    assert len(counters.peers) == MAX_PEERS
    assert counters.peer("shm", "first") is kept
    assert ("shm", "other0") not in counters.peers

"""Engines of several ranks: the single engine's numbers, and what happens when a rank dies, hangs or cannot
start."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diphase.checkpoints.dummy import files_from_dummy
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.engine.rank_group import RankGroup
from diphase.engine.sequence import Sequence
from diphase.engine.tensor_parallel import layout_of, num_blocks_of, sharding_of
from diphase.engine.weights import drawn_tensors, rank_tensors
from diphase.proto.errors import CheckpointError, ConfigError, InternalError, WorkerLost
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo

from ..live_workers import rank_pids

PROMPT = [(i * i * 7 + i * 31) % 490 + 5 for i in range(150)]
CONFIG = EngineConfig(model="dummy:tiny", dtype="fp32", kv_cache_mib=4)
TWO = replace(CONFIG, tensor_parallel=2)


def wait_for_exit(*handles: int) -> None:
    """Of processes, by their pidfds."""
    for handle in handles:
        with open(handle, "rb") as process:
            assert select.select([process], [], [], 20.0)[0], "a process lives on"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not rank_pids()


def sequence(num_tokens: int) -> Sequence:
    return Sequence(
        key=HandoffKey("r", 0),
        gateway_id="",
        token_ids=PROMPT[:num_tokens],
        num_prompt_tokens=num_tokens,
        params=SamplingParams(),
        slo=Slo(),
        arrived_at=0.0,
        block_table=[5, 9, 2, 31, 17, 1, 20, 8, 11, 4],
    )


def plan(num_tokens: int = 20) -> StepPlan:
    return StepPlan(chunks=[Chunk(sequence=sequence(num_tokens), num_tokens=num_tokens, samples=True)])


def last_logits(engine: TorchEngine, pieces: list[int]) -> torch.Tensor:
    """Of the last token of the prompt's first sum(pieces) tokens, computed in those pieces."""
    of = sequence(sum(pieces))
    for num_tokens in pieces:
        chunk = Chunk(sequence=of, num_tokens=num_tokens, samples=num_tokens == of.num_uncomputed)
        logits = engine.logits(StepPlan(chunks=[chunk]))
        of.num_computed += num_tokens
    return logits[0]


def biased(folder: Path) -> str:
    """A model with everything that a shape may have, as a file that every rank can read."""
    config = replace(
        files_from_dummy("dummy:tiny").config,
        num_layers=2,
        num_q_heads=6,
        num_kv_heads=3,
        head_dim=16,
        intermediate_size=96,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    path = folder / "config.json"
    path.write_text(config.to_json())
    return f"dummy:{path}"


@pytest.mark.parametrize(
    ("model", "tp", "regions"),
    [("dummy:tiny", 2, 1.0), ("dummy:tiny", 4, 2.0), ("biased", 3, 1.0)],
    ids=["two ranks", "four ranks with copies of two heads", "three ranks, biased and tied"],
)
def test_ranks_give_the_single_engine_s_logits_and_tokens(
    model: str, tp: int, regions: float, tmp_path: Path
) -> None:
    config = replace(CONFIG, model=biased(tmp_path) if model == "biased" else model)
    single, several = TorchEngine.load(config), TorchEngine.load(replace(config, tensor_parallel=tp))
    try:
        assert several.layout == single.layout
        assert several.num_blocks == int(single.num_blocks / regions)
        for pieces in ([1], [150], [64, 48, 38], [99, 1, 1, 1]):
            error = (last_logits(several, pieces) - last_logits(single, pieces)).abs().max()
            assert error < 1e-5
        prompts = [PROMPT[:n] for n in (1, 17, 64, 150)]
        params = [SamplingParams(max_tokens=24, ignore_eos=True)] * len(prompts)
        tokens = [
            [[token.token_id for token in of] for of in generate(engine, prompts, params)]
            for engine in (single, several)
        ]
        assert tokens[0] == tokens[1]
    finally:
        single.close()
        several.close()


def test_int8_weights_are_quantised_by_each_rank() -> None:
    engines = [
        TorchEngine.load(replace(CONFIG, dtype="int8", tensor_parallel=tp), progress=None) for tp in (1, 2)
    ]
    try:
        one, two = (last_logits(engine, [150]).float() for engine in engines)
        # A rank scales its own part of a row: near, but not equal.
        assert (one - two).abs().max() < 0.05 * one.abs().max()
    finally:
        for engine in engines:
            engine.close()


def test_a_model_that_cannot_be_cut_so_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"smollm2-135m.* 9 query heads, 3 key-value .*possible are 1, 3$"):
        TorchEngine.load(EngineConfig(model="dummy:smollm2-135m", tensor_parallel=2))
    with pytest.raises(ConfigError, match="no room for one block"):
        TorchEngine.load(replace(CONFIG, model="dummy:llama-3.1-8b", kv_cache_mib=1, tensor_parallel=2))
    for wrong in ({"tensor_parallel": 0}, {"tensor_parallel": 2, "cores": (0, 1, 2)}, {"rank_timeout_s": 0}):
        with pytest.raises(ConfigError):
            EngineConfig(**wrong)


def test_the_pool_s_memory_is_that_of_all_ranks_together() -> None:
    files = files_from_dummy("dummy:tiny")
    layout = layout_of(files, CONFIG)
    for tp, regions in ((1, 1), (2, 1), (4, 2)):
        sharding = sharding_of(files, replace(CONFIG, tensor_parallel=tp))
        assert num_blocks_of(layout, sharding, CONFIG) == (4 << 20) // layout.block_bytes // regions


@pytest.mark.parametrize("tp", [2, 4])
def test_the_parts_of_the_ranks_are_the_weights(tp: int) -> None:
    config = replace(files_from_dummy("dummy:tiny").config, attention_bias=True, mlp_bias=True)
    read = drawn_tensors(config, 0, torch.float32)
    parts = [rank_tensors(read, config, tp, rank) for rank in range(tp)]
    for name, dim in (("mlp.up_proj", 0), ("mlp.down_proj", 1), ("self_attn.o_proj", 1)):
        full = f"model.layers.1.{name}.weight"
        assert torch.equal(torch.cat([part(full) for part in parts], dim), read(full))
    keys = "model.layers.1.self_attn.k_proj.weight"
    copies = max(1, tp // config.num_kv_heads)
    assert torch.equal(torch.cat([part(keys) for part in parts[::copies]]), read(keys))
    assert all(torch.equal(parts[r](keys), parts[r // copies * copies](keys)) for r in range(tp))
    bias = "model.layers.1.mlp.down_proj.bias"
    assert torch.equal(sum(part(bias) for part in parts), read(bias))  # type: ignore[arg-type]


def test_a_rank_that_dies_in_a_step_is_a_lost_worker() -> None:
    engine = TorchEngine.load(TWO)
    try:
        (pid,) = rank_pids()
        with pytest.raises(WorkerLost):  # after the first layer, of which it had told
            engine.execute(plan(), lambda layer: os.kill(pid, signal.SIGKILL) if layer == 0 else None)
        with pytest.raises(WorkerLost):
            engine.execute(plan())
    finally:
        engine.close()


def test_a_rank_that_dies_between_steps_is_noticed() -> None:
    engine = TorchEngine.load(TWO)
    lost: list[Exception] = []
    noticed = threading.Event()

    def told(error: Exception) -> None:
        lost.append(error)
        noticed.set()

    try:
        engine.watch(told)
        (pid,) = rank_pids()
        os.kill(pid, signal.SIGKILL)
        assert noticed.wait(20.0)
        assert isinstance(lost[0], WorkerLost)
        assert str(pid) in str(lost[0])
    finally:
        engine.close()
    assert len(lost) == 1


def test_closing_is_no_loss() -> None:
    engine = TorchEngine.load(TWO)
    lost: list[Exception] = []
    engine.watch(lost.append)
    engine.close()
    engine.close()
    assert not lost


def test_a_stopped_rank_ends_the_step_at_its_deadline_and_no_layer_is_said_to_be_there() -> None:
    engine = TorchEngine.load(replace(TWO, rank_timeout_s=1.0))
    try:
        (pid,) = rank_pids()
        os.kill(pid, signal.SIGSTOP)
        layers: list[int] = []
        with pytest.raises(WorkerLost):
            engine.execute(plan(), layers.append)
        assert not layers
    finally:
        engine.close()


def test_a_rank_that_cannot_compute_says_why() -> None:
    engine = TorchEngine.load(TWO)
    try:
        rank = os.pidfd_open(rank_pids()[0])
        wrong = plan()
        wrong.chunks[0].sequence.token_ids[3] = 10**6  # outside the embedding, on both
        with pytest.raises(Exception, match="index out of range") as told:
            engine.execute(wrong)
        wait_for_exit(rank)
        assert not isinstance(told.value, WorkerLost)  # rank 0's own, before it waits for anybody
        with pytest.raises(WorkerLost, match="index out of range"):
            engine.execute(plan())
    finally:
        engine.close()


def test_after_a_step_that_failed_on_one_rank_alone_no_other_is_computed() -> None:
    """The other rank still waits for its sums, and would add those of the next step to its own."""
    engine = TorchEngine.load(TWO)

    def hook(layer: int) -> None:
        raise ValueError(f"no interest in layer {layer}")

    try:
        with pytest.raises(InternalError):  # before the others hear of it: no harm
            engine.execute(plan(0))
        engine.execute(plan())
        with pytest.raises(ValueError, match="no interest in layer 0"):
            engine.execute(plan(), hook)
        with pytest.raises(WorkerLost, match="still in it"):
            engine.execute(plan())
    finally:
        engine.close()


def test_a_rank_that_cannot_start_says_why() -> None:
    group = RankGroup(TWO, "another fingerprint")
    try:
        with pytest.raises(CheckpointError, match="changed while it was loaded"):
            group.wait_loaded([1])
    finally:
        group.close()


def test_ranks_run_on_their_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    engine = TorchEngine.load(replace(TWO, cores=(cores[0], cores[-1])))
    try:
        (pid,) = rank_pids()
        assert os.sched_getaffinity(pid) == {cores[-1]}
    finally:
        engine.close()


PARENT = """
import sys
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
engine = TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=4, tensor_parallel=2))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["computing", "stopped"])
def test_ranks_die_with_their_parent(stopped: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (pid,) = rank_pids(parent.pid)
        handle = os.pidfd_open(pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    wait_for_exit(handle)

"""The steps of a further rank: the same rows through its own part of the model, into its own pool."""

from __future__ import annotations

import socket

import torch

from ..checkpoints.lookup import resolve
from ..proto.errors import CheckpointError, InternalError
from . import rank_wire
from .kv_pool import KvPool
from .model_runner import step_tensors
from .rank_wire import Kind, RankSpec
from .ranks import GlooRanks, Ranks
from .shard import load_shard
from .step_rows import StepRows


def compute(sock: socket.socket, spec: RankSpec) -> None:
    """Until rank 0 is gone.

    Raises:
        WorkerLost: rank 0 or another rank is gone.
        DiphaseError: the model cannot be loaded, or a step is not what it should be.
    """
    files = resolve(spec.config.model)
    if files.fingerprint != spec.fingerprint:
        raise CheckpointError(f"{files.name} changed while it was loaded; start the worker again")

    def connect(pool: KvPool) -> Ranks:
        rank_wire.send(sock, Kind.READY, rank_wire.ready_payload(len(pool.buffer)), pool.fd)
        return GlooRanks(
            spec.rank,
            spec.config.tensor_parallel,
            store_path=spec.store_path,
            timeout_s=spec.config.rank_timeout_s,
        )

    shard = load_shard(files, spec.config, spec.rank, connect)
    while True:
        kind, payload, _ = rank_wire.receive(sock)
        if kind is not Kind.STEP:
            raise InternalError(f"a rank that computes was told {kind.name}")
        with torch.inference_mode():
            shard.model.forward(step_tensors(shard.model, StepRows.from_bytes(payload)))

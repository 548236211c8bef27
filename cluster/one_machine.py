"""Small clusters on this machine for `diphase profile` and `diphase validate`: which workers on which cores,
and how they are started. One worker has one core, as far as there are enough."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ..proto.clock import system_rng
from ..proto.errors import ConfigError
from ..proto.inference_pb2_grpc import InferenceStub
from .config import ClusterConfig, load
from .endpoint import open_channel
from .load.client import fetch_model
from .load.served import SERVE, serving
from .load.workload import ModelShape

PLACEMENTS = {"1p1d": ("prefill", "decode"), "colocated": ("colocated",)}
"""Roles of the workers."""
POOLS = ("prefill", "decode", "colocated")
FREE_MEMORY_MIB = 64
"""Of the pool of an engine that only keeps a core busy."""


def cores() -> list[int]:
    """That this process may use, in order."""
    return sorted(os.sched_getaffinity(0))


def cores_of_worker(index: int, threads: int) -> list[int]:
    """Of the machine's worker `index`; empty, which leaves them to the system, where there are not enough."""
    return cores()[index * threads : (index + 1) * threads]


def placement_settings(placement: str, threads: int) -> list[str]:
    """`--set` values of a placement of PLACEMENTS.

    Raises:
        ConfigError: it is unknown.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement {placement!r} is unknown; use {' or '.join(PLACEMENTS)}")
    roles = PLACEMENTS[placement]
    own = [cores_of_worker(i, threads) for i in range(len(roles))]
    values = [f"pools.{pool}.workers={roles.count(pool)}" for pool in POOLS]
    if len(cores()) >= threads * len(roles):
        values += [f"pools.{role}.cores={mine}" for role, mine in zip(roles, own, strict=True)]
    return values


class OneMachine:
    """A placement of a configuration, given on the command line."""

    def __init__(self, args: argparse.Namespace, placement: str, *further: str) -> None:
        """
        Raises:
            ConfigError: a value is wrong.
        """
        given = [*model_setting(args), *args.settings]
        threads = load(args.config, given, system_rng()).engine.threads
        self._settings = [*placement_settings(placement, threads), *given, *further]
        self._file: Path | None = args.config
        self.config: ClusterConfig = load(args.config, self._settings, system_rng())

    @asynccontextmanager
    async def serving(self, log: Path) -> AsyncIterator[tuple[InferenceStub, ModelShape]]:
        """Started, ready, and stopped afterwards.

        Raises:
            InternalError: see load.served.serving().
        """
        command: Sequence[str] = SERVE if self._file is None else (*SERVE, "--config", str(self._file))
        async with serving(self._settings, log, command=command) as address, open_channel(address) as channel:
            stub = InferenceStub(channel)
            model = await fetch_model(stub, address, self.config.security.cluster_token)
            yield stub, ModelShape(context_length=model.context_length, vocab_size=model.vocab_size)


def model_setting(args: argparse.Namespace) -> list[str]:
    """Of --model."""
    return [] if args.model is None else [f"model.name={args.model}"]

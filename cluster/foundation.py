"""What a cluster stands on: a folder, a watchdog, Ray and the store. Set up in this order, let go of in
reverse."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..proto.errors import ConfigError
from . import actors, ray_runtime
from .config import ClusterConfig
from .ray_runtime import RayRuntime
from .store import Store, open_store
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

TEMPORARY = Path("/tmp")
"""Not $TMPDIR: the paths of unix sockets below it have at most 107 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundation:
    """Everything that is not a process of a role."""

    folder: Path
    """Sockets and logs; removed at the end. Its name is the mark of the cluster's processes, see
    processes.py."""
    runtime: RayRuntime
    store: Store


@contextlib.contextmanager
def foundation(config: ClusterConfig) -> Iterator[Foundation]:
    """Sets up for `config` and lets go of it all at the end, whatever fails on the way.

    Raises:
        ConfigError: this machine cannot give what `config` asks of it, or the store or the Ray cluster that
            it names is not there.
        InternalError: a private one did not start.
    """
    if not config.ray.address:
        _check_machine(config)
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="diphase-", dir=TEMPORARY))
        logger.info("foundation_begun folder=%s", folder)
        watchdog = Watchdog(folder)
        stack.callback(_finish, watchdog)
        store = open_store(config.store, folder)
        stack.callback(store.stop)
        runtime = ray_runtime.start(config.ray, folder, _num_cpus(config))
        stack.callback(runtime.stop)
        yield Foundation(folder=folder, runtime=runtime, store=store)


def _check_machine(config: ClusterConfig) -> None:
    """On a joined Ray the processes may run elsewhere; each then finds out by itself."""
    actors.open_log_dir(config.supervisor.log_dir)
    memory_mib = (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 20
    if config.ray.object_store_mib > memory_mib:
        raise ConfigError(
            f"ray.object_store_mib = {config.ray.object_store_mib} is more than the {memory_mib} MiB of "
            "memory that this machine has; 80 is enough"
        )


def _finish(watchdog: Watchdog) -> None:
    if left := watchdog.finish():
        logger.info("stragglers_killed processes=%d", left)


def _num_cpus(config: ClusterConfig) -> float:
    """What a private Ray is told it has: the machine's cores, or more when the pools ask for more. Ray only
    counts."""
    wanted = sum(pool.workers * pool.bundle().get("CPU", 0.0) for pool in config.pools.placements().values())
    return max(float(os.cpu_count() or 1), wanted)

"""Ray, started for this cluster alone or joined where it runs, and nothing of Ray beyond this process's
connection.

A private Ray is local, quiet, without dashboard, in a folder of its own, guarded by a token of its own and
ended with the cluster. A joined one keeps running: only what this cluster placed on it goes. `ray stop` is
never called, it would end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..proto.errors import ConfigError, InternalError
from .config import RayConfig

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.2"
"""Node address of a private Ray. Ray replaces 127.0.0.1 by an address that other machines reach."""
REACH_S = 3.0

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would hide every GPU from actors that ask for none, and warns that it will stop doing so.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayRuntime:
    """A connection of this process to Ray. There is at most one a process."""

    NEEDED = ("gcs_server", "raylet")
    """Processes of a private Ray without which nothing can be placed, noticed or restarted."""

    private: bool
    node_id: str
    """Of the node this process runs on."""

    def dead(self) -> str | None:
        """What has died of a private Ray, which does not restart itself; None: nothing, or it is not ours.
        Ray's own word of it comes after 15 seconds to a minute."""
        from ray._private import worker

        node = worker._global_node if self.private else None
        names = {name for name, _ in node.dead_processes()} if node is not None else set()
        return next((name for name in self.NEEDED if name in names), None)

    def stop(self) -> None:
        """Disconnects; a private Ray ends with it. Idempotent."""
        import ray

        ray.shutdown()


def start(config: RayConfig, folder: Path, num_cpus: float) -> RayRuntime:
    """Starts a private Ray in `folder`, with room for `num_cpus`, or joins `ray.address`.

    Must run on the main thread: Ray's processes are told to end with the thread that started them.

    Raises:
        ConfigError: the cluster at `ray.address` cannot be joined.
        InternalError: a private Ray did not start.
    """
    with _environment(_ALWAYS):
        if not config.address:
            # Not undone: Ray keeps the token it read first for as long as the process lives.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        if ray.is_initialized():
            raise InternalError("this process has a connection to Ray already; run one cluster a process")
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        with _stderr_to(folder / "ray.log"), _sigterm_kept():
            if config.address:
                _join(ray, config, quiet)
            else:
                with _apart():
                    _start_private(ray, config, folder, num_cpus, quiet)
        _log_instead_of_print()
        return RayRuntime(private=not config.address, node_id=ray.get_runtime_context().get_node_id())


def _start_private(ray: Any, config: RayConfig, folder: Path, num_cpus: float, quiet: dict[str, Any]) -> None:
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=num_cpus,
            object_store_memory=config.object_store_mib * 1024 * 1024,
            _temp_dir=str(folder / "ray"),
            _node_ip_address=LOOPBACK,
            **quiet,
        )
    except Exception as exc:
        raise InternalError(f"a private Ray did not start in {folder}: {_first_line(exc)}") from exc


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """What SIGTERM does is for the command to decide; Ray would exit, in the midst of its start too. Its
    native part sets a handler of its own when it connects: whenever Ray's Python part asks for its own, and
    at the end, the command's is set again."""
    from ray._private import utils

    ours = signal.getsignal(signal.SIGTERM)
    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _handler: signal.signal(signal.SIGTERM, ours)
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Ray's processes start in sessions of their own and deaf to SIGTERM: whoever ends the supervisor by a
    signal to its process group (`timeout`) or to all that it started (systemd) would end Ray first, and this
    process's connection then tries for a minute to reach it again, and aborts the process."""
    from ray._private import services

    class Apart(services.ConsolePopen):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, start_new_session=True, **options)

        def terminate(self) -> None:
            # Ray's polite end, which it waits a second for. There is nothing that it would save.
            self.kill()

    original = services.ConsolePopen
    services.ConsolePopen = Apart
    # Inherited by what is started here, and by what that starts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        services.ConsolePopen = original


def _join(ray: Any, config: RayConfig, quiet: dict[str, Any]) -> None:
    _check_reachable(config.address)
    try:
        ray.init(address=config.address, **quiet)
    except Exception as exc:
        raise ConfigError(
            f'ray.address = "{config.address}" cannot be joined: {_first_line(exc)} '
            "(a Ray with authentication needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH)"
        ) from exc


def _check_reachable(address: str) -> None:
    """Ray itself tries for 20 seconds before it says that nobody is there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "auto" and the like
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except ValueError as exc:
        raise ConfigError(f'ray.address = "{address}" is not host:port') from exc
    except OSError as exc:
        raise ConfigError(f'ray.address = "{address}": nothing answers there: {exc.strerror or exc}') from exc


def _log_instead_of_print() -> None:
    """Ray prints each worker's death into the driver's output; here such lines go to the log."""
    from ray._private import worker

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        logger.debug("ray_says lines=%s", data.get("lines"))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Ray's native part writes its warnings straight to file descriptor 2."""
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets what Ray's processes shall inherit and restores what was there."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

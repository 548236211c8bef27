"""Which transports this process opens, and which one two workers use.

A new transport is one file plus one line in config.TRANSPORTS; its module is imported when it is opened.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from ..proto.clock import Clock
from ..proto.errors import ConfigError, TransferError
from .base import Event, LocalPeers, Region, Transport, TransportContext, TransportFactory
from .byte_worker import ByteWorker
from .config import IN_PROCESS, TRANSPORTS, KvTransferConfig, unknown_transport

FOR_FABRICS = frozenset({"nixl"})
"""What `auto` opens only where there is an RDMA device. Elsewhere NIXL goes over TCP, slower than tcp does
(benchmarks/transport.py); and UCX's hooks stay out of the process."""

EXTRAS: Mapping[str, str] = {"nixl_cu13": "nixl", "cupy": "cuda", "triton": "cuda"}
"""Library to the extra of this package that installs it."""

_log = logging.getLogger(__name__)


class _Waker:
    """Stands between the transports, which are made first, and the pump that they wake."""

    def __init__(self) -> None:
        self.callback: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.callback is not None:
            self.callback()


class TransportSet:
    """A worker's KV memory with everything that moves or reads it off the event loop: the open transports,
    which all know the pool of rank r as region r and the staging buffer as the region after them, and the
    byte worker."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        pools: Sequence[Region],
        *,
        staging: Region | None = None,
        left_out: Mapping[str, str] = MappingProxyType({}),
        waker: _Waker | None = None,
        byte_thread: bool = True,
    ) -> None:
        """`transports` have registered nothing yet; those that cannot are closed and left out. When this
        raises, they stay the caller's to close. `left_out`: see there."""
        self.pools = list(pools)
        self.staging = staging
        self._waker = waker or _Waker()
        self._transports: dict[str, Transport] = {}
        self.left_out: dict[str, str] = dict(left_out)
        """Transports that were wanted and are not open: name to reason."""
        for name, transport in transports.items():
            try:
                for region in (*pools, *([staging] if staging else [])):
                    transport.register(region)
            except TransferError as error:
                _log.info("transport_unusable name=%s why=%r", name, error.message)
                self.left_out[name] = error.message
                transport.close()
                continue
            self._transports[name] = transport
        self.worker = ByteWorker(self._waker, threaded=byte_thread)

    @property
    def staging_region(self) -> int:
        """Id of the staging buffer's region, where there is one."""
        return len(self.pools)

    @property
    def names(self) -> list[str]:
        """Best first."""
        return list(self._transports)

    def __getitem__(self, name: str) -> Transport:
        return self._transports[name]

    def listen(self, callback: Callable[[], None]) -> None:
        """`callback` is called from any thread when poll() or worker.poll() has something."""
        self._waker.callback = callback

    def endpoints(self) -> dict[str, bytes]:
        """Name to endpoint(), for the hello."""
        return {name: transport.endpoint() for name, transport in self._transports.items()}

    def choose(self, offered: Mapping[str, bytes], wanted: str = "auto") -> str:
        """The best transport that both ends have and that reaches the peer. The log says why others that
        were wanted are not used.

        Raises:
            TransferError: there is none; the message says why for each.
        """
        reasons = [f"{name}: {why}" for name, why in self.left_out.items()]
        for name, transport in self._transports.items():
            if wanted not in ("auto", name):
                continue
            why = "the peer does not offer it" if name not in offered else transport.reaches(offered[name])
            if why is None:
                _log.info("transport_chosen name=%s passed_over=%r", name, "; ".join(reasons))
                return name
            reasons.append(f"{name}: {why}")
        if wanted not in ("auto", *self.names):
            reasons.append(f"{wanted} is not open here, only {self.names}")
        raise TransferError(f"no common transport: {'; '.join(reasons)}")

    def poll(self, max_events: int = 64) -> list[tuple[str, Event]]:
        """(transport's name, event) so far; never blocks."""
        events: list[tuple[str, Event]] = []
        for name, transport in self._transports.items():
            polled = transport.poll(max_events)
            if len(polled) == max_events:
                self._waker()
            events.extend((name, event) for event in polled)
        return events

    def close(self) -> None:
        """Closes every transport and the byte worker. Blocks. Idempotent."""
        for transport in self._transports.values():
            transport.close()
        self.worker.close()


def load_factory(name: str) -> TransportFactory:
    """The class that TRANSPORTS names.

    Raises:
        ConfigError: there is no such transport, or what it needs is not installed.
    """
    if name not in TRANSPORTS:
        raise unknown_transport(name)
    module, _, attribute = TRANSPORTS[name].partition(":")
    try:
        factory: TransportFactory = getattr(importlib.import_module(module), attribute)
        for needed in getattr(factory, "needs", ()):  # what it imports only when it is made
            if importlib.util.find_spec(needed) is None:
                raise ModuleNotFoundError(f"No module named {needed!r}", name=needed)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise ConfigError(
            f"kv_transfer.transport = {name!r} needs {library}, which is not installed; "
            f"run `pip install diphase[{EXTRAS[library]}]`"
        ) from error
    except ImportError as error:
        raise ConfigError(f"kv_transfer.transport = {name!r} cannot be loaded: {error}") from error
    return factory


def has_fabric(devices: Path = Path("/sys/class/infiniband")) -> bool:
    """Whether this machine has an RDMA device."""
    return devices.is_dir() and any(devices.iterdir())


def auto_order(names: Iterable[str], *, fabric: bool, in_process: bool) -> list[str]:
    """What `auto` opens of the registry's `names`, best first. `in_process`: roles of this process may meet
    without leaving it."""
    return [
        name for name in names if (in_process or name != IN_PROCESS) and (fabric or name not in FOR_FABRICS)
    ]


def open_transports(
    config: KvTransferConfig,
    *,
    incarnation: str,
    pools: Sequence[Region],
    clock: Clock,
    staging: Region | None = None,
    token: str = "",
    hub: LocalPeers | None = None,
) -> TransportSet:
    """Opens the configured transport, or with "auto" all that work here. `hub` joins roles of one process;
    without one the transport that needs it is not tried.

    Raises:
        ConfigError: the configured transport is unknown or not installed, or `config.host` is no address of
            this machine.
        TransferError: it does not work here, or none does.
    """
    waker = _Waker()
    context = TransportContext(
        incarnation=incarnation,
        wake=waker,
        clock=clock,
        token=token,
        host=config.host,
        tcp_sockets=config.tcp_sockets,
        hub=hub,
    )
    opened: dict[str, Transport] = {}
    left_out: dict[str, str] = {}
    wanted = [config.transport]
    if config.transport == "auto":
        wanted = auto_order(TRANSPORTS, fabric=has_fabric(), in_process=hub is not None)
        left_out = dict.fromkeys(FOR_FABRICS.difference(wanted), "there is no RDMA device")
    with ExitStack() as on_error:
        for name in wanted:
            try:
                factory = load_factory(name)
            except ConfigError as error:
                if config.transport != "auto":
                    raise
                _log.info("transport_not_installed name=%s why=%r", name, error.message)
                left_out[name] = error.message
                continue
            try:
                opened[name] = factory(context)
            except (TransferError, OSError) as error:
                _log.info("transport_unusable name=%s why=%r", name, str(error))
                left_out[name] = str(error)
            else:
                on_error.callback(opened[name].close)
        transports = TransportSet(opened, pools, staging=staging, left_out=left_out, waker=waker)
        if not transports.names:
            why = "; ".join(f"{name}: {reason}" for name, reason in transports.left_out.items())
            raise TransferError(
                f"kv_transfer.transport = {config.transport!r} does not work on this machine ({why})"
            )
        on_error.pop_all()
    return transports

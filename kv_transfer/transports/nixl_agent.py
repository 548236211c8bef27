"""One NIXL agent with the UCX backend, as little of it as transfers need. Knows addresses and names of
agents; no peers, jobs or regions of the transport.

Metadata is read by NIXL's own C++ code. What its Python layer has to put lists into bytes
(get_serialized_descs, deserialize_descs) would execute what a peer sends, and is not used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from .ucx_report import REPORT

BACKEND = "UCX"
_LIBRARY = "nixl_cu13"

if importlib.util.find_spec(_LIBRARY) is None:  # loading it has side effects and is left to the first agent
    raise ModuleNotFoundError(f"No module named {_LIBRARY!r}", name=_LIBRARY)

Descriptors = NDArray[np.int64]
"""[n, 3]: address, length, device."""

_log = logging.getLogger(__name__)


def version() -> str:
    return importlib.metadata.version("nixl-cu13")


class NixlAgent:
    """Not thread-safe, and without a thread of its own that makes progress: that happens in done() and
    notifications()."""

    def __init__(self, name: str) -> None:
        """
        Raises:
            TransferError: NIXL or its UCX backend does not work here.
        """
        self.name = name
        with REPORT.listening():
            library = _load()
            names = vars(library._bindings).values()
            own = [kind for kind in names if isinstance(kind, type) and issubclass(kind, Exception)]
            self._errors: tuple[type[Exception], ...] = (RuntimeError, *own)
            with self._mapped("no agent can be made"):
                config = library.nixl_agent_config(enable_prog_thread=False, backends=[BACKEND])
                self._agent: Any = library.nixl_agent(name, config)
        if BACKEND not in self._agent.backends:
            raise TransferError(f"NIXL has no backend {BACKEND} here, only {self._agent.get_plugin_list()}")
        self._registered: list[Any] = []
        _log.info("nixl_agent name=%s nixl=%s backend=%s", name, version(), BACKEND)

    def register(self, kind: str, address: int, num_bytes: int, device: int) -> None:
        """`kind` is DRAM or VRAM.

        Raises:
            TransferError: NIXL cannot register that memory.
        """
        with self._mapped(f"{num_bytes} bytes of {kind} cannot be registered"):
            row = np.array([[address, num_bytes, device]], dtype=np.int64)
            self._registered.append(self._agent.register_memory(row, kind))

    def metadata(self) -> bytes:
        """What another agent needs to write here; after the last register()."""
        with self._mapped("there is no metadata"):
            return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> str:
        """Makes another agent known and returns its name. The bytes must be trusted: NIXL checks their form,
        but hands the addresses in them to UCX, which does not.

        Raises:
            TransferError: they are not metadata of an agent that can be reached.
        """
        with self._mapped("the metadata cannot be loaded"):
            name = self._agent.add_remote_agent(metadata)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def leave(self, name: str) -> None:
        """Forgets another agent. No transfer to it may be in flight."""
        with self._mapped(f"{name} cannot be left"):
            self._agent.remove_remote_agent(name)

    def write(self, kinds: tuple[str, str], local: Descriptors, remote: Descriptors, name: str) -> Any:
        """Begins a write from memory here to memory there (`kinds`) and returns its handle, which must not be
        let go of before done() has said so, or raised: NIXL would take a transfer in flight for over.

        Raises:
            TransferError: it cannot begin.
        """
        agent = self._agent
        with self._mapped(f"the write to {name} cannot begin"):
            handle = agent.initialize_xfer(
                "WRITE", agent.get_xfer_descs(local, kinds[0]), agent.get_xfer_descs(remote, kinds[1]), name
            )
            if agent.transfer(handle) == "ERR":
                raise TransferError(f"NIXL: the write to {name} has failed")
        return handle

    def done(self, handle: Any) -> bool:
        """Whether the bytes are there. Afterwards the handle is gone, also when this raises.

        Raises:
            TransferError: the transfer has failed.
        """
        with self._mapped("the transfer has failed"):
            state = self._agent.check_xfer_state(handle)
            if state == "PROC":
                return False
            handle.release()
        if state != "DONE":
            raise TransferError("NIXL: the transfer has failed")
        return True

    def notify(self, name: str, message: bytes) -> None:
        """Sends a message, which follows what done() has said to be there.

        Raises:
            TransferError: the other agent cannot be reached.
        """
        with self._mapped(f"{name} cannot be notified"):
            self._agent.send_notif(name, message)

    def notifications(self) -> dict[str, list[bytes]]:
        """Messages that have come since the last call, by the name of the sending agent; whole, each once."""
        with self._mapped("notifications cannot be read"):
            found: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return found

    def close(self) -> None:
        """Its connections end, and with them what is in flight."""
        for registered in self._registered:
            try:
                self._agent.deregister_memory(registered)
            except self._errors as error:
                _log.warning("nixl_deregister_failed name=%s why=%r", self.name, str(error))
        self._registered.clear()
        self._agent = None

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise TransferError(f"NIXL: {what}: {error}") from error


def _load() -> Any:
    """The library. Importing it sets up logging of its own on standard output and silences errors of all
    handlers; both are taken back.

    Raises:
        TransferError: it does not load.
    """
    raises = logging.raiseExceptions
    try:
        library = importlib.import_module(_LIBRARY)
    except ImportError as error:
        raise TransferError(f"{_LIBRARY} is installed and cannot be loaded: {error}") from error
    logging.raiseExceptions = raises
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return library

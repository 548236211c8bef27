"""The other process of the transport tests: one transport, one region, told by lines of JSON what to do."""

from __future__ import annotations

import base64
import json
import mmap
import os
import sys
import threading

import numpy as np
from diphase.kv_transfer.base import Notified, PeerDown, Region, TransportContext
from diphase.kv_transfer.registry import load_factory
from diphase.proto.clock import MonotonicClock


def main(name: str, incarnation: str, size: int) -> None:
    woken = threading.Event()
    fd = os.memfd_create("child")
    os.ftruncate(fd, size)
    buffer = memoryview(mmap.mmap(fd, size))
    # "tcp over 3 sockets", as transport_ends.OVER_LANES has it.
    name, _, sockets = name.partition(" over ")
    context = TransportContext(
        incarnation=incarnation,
        wake=woken.set,
        clock=MonotonicClock(),
        tcp_sockets=int(sockets.split()[0]) if sockets else 1,
    )
    transport = load_factory(name)(context)
    transport.register(Region(buffer=buffer, fd=fd))
    print(json.dumps({"endpoint": base64.b64encode(transport.endpoint()).decode()}), flush=True)

    def serve() -> None:
        while True:
            woken.wait()
            woken.clear()
            while events := transport.poll():
                for event in events:
                    if isinstance(event, Notified):
                        print(json.dumps({"notified": event.tag.decode()}), flush=True)
                    elif isinstance(event, PeerDown):
                        print(json.dumps({"down": event.peer}), flush=True)

    threading.Thread(target=serve, daemon=True).start()
    for line in sys.stdin:
        command = json.loads(line)
        if "admit" in command:
            transport.admit(command["admit"])
        elif "connect" in command:
            transport.connect(base64.b64decode(command["connect"]), 5.0)
        elif "write" in command:  # the whole region, byte by byte the same
            np.frombuffer(buffer, dtype=np.uint8)[:] = command["fill"]
            segments = np.array([[0, 0, 0, 0, size]], dtype=np.int64)
            for i in range(command["times"]):
                transport.write(command["write"], segments, f"part {i}".encode(), 10.0)
        elif "fill" in command:
            np.frombuffer(buffer, dtype=np.uint8)[:] = command["fill"]
        print(json.dumps({"ok": True}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

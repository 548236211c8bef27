"""The other process of the transport tests: one transport, one region, told by lines of JSON what to do."""

from __future__ import annotations

import base64
import json
import sys
import threading

import numpy as np
from diphase.kv_transfer.base import Done, Failed, Fenced, Notified, PeerDown, TransportContext
from diphase.proto.clock import MonotonicClock

from .host_gpu import make_transport
from .region_memory import make_memory

_out = threading.Lock()


def say(line: dict[str, object]) -> None:
    """Two threads say something."""
    with _out:
        print(json.dumps(line), flush=True)


def main(name: str, incarnation: str, size: int, host: str) -> None:
    woken = threading.Event()
    memory = make_memory(name, "child", size)
    # "tcp over 3 sockets", as transport_ends.OVER_LANES has it.
    name, _, sockets = name.partition(" over ")
    context = TransportContext(
        incarnation=incarnation,
        wake=woken.set,
        clock=MonotonicClock(),
        host=host,
        tcp_sockets=int(sockets.split()[0]) if sockets else 1,
    )
    transport = make_transport(name, context)
    transport.register(memory.region)
    say({"endpoint": base64.b64encode(transport.endpoint()).decode()})

    def serve() -> None:
        while True:
            woken.wait()
            woken.clear()
            while events := transport.poll():
                for event in events:
                    if isinstance(event, Notified):
                        say({"notified": event.tag.decode()})
                    elif isinstance(event, PeerDown):
                        say({"down": event.peer})
                    elif isinstance(event, Done):
                        say({"done": event.transfer_id})
                    elif isinstance(event, Failed):
                        say({"failed": event.code})
                    elif isinstance(event, Fenced):
                        say({"fenced": event.ok})

    threading.Thread(target=serve, daemon=True).start()
    for line in sys.stdin:
        command, ok = json.loads(line), 1
        if "admit" in command:
            transport.admit(command["admit"])
        elif "connect" in command:
            transport.connect(base64.b64decode(command["connect"]), 5.0)
        elif "write" in command:  # the whole region, byte by byte the same
            memory.bytes[:] = command["fill"]
            segments = np.array([[0, 0, 0, 0, size]], dtype=np.int64)
            for i in range(command["times"]):
                tag = f"part {i}".encode()
                transport.write(command["write"], segments, tag, command.get("s", 30.0))
        elif "fill" in command:
            memory.bytes[:] = command["fill"]
        elif "fence" in command:
            transport.fence(command["fence"], command["s"])
        elif "sums" in command:
            ok = int(memory.bytes.sum(dtype=np.int64))
        say({"ok": ok})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), (*sys.argv[4:], "127.0.0.1")[0])

"""Whatever bytes come over the wire: refused or closed with an error that names what is wrong, while the
process and the other peers go on; nothing out of bounds is written, nothing that comes is executed."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diphase.kv_transfer.base import Notified
from diphase.kv_transfer.transports.endpoint import VERSION, check_fields, read_endpoint, read_sizes
from diphase.kv_transfer.transports.framing import HEADER, MAX_BODY
from diphase.kv_transfer.transports.socket_peer import ID, WRITE_HEAD, Kind
from diphase.proto.errors import TransferError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .wire_strangers import SIZE, End, Stranger, commit, frame, hello, refusal, write

FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = itertools.count()


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[End, End]]:
    """One that is attacked, and a friend who writes to it all the time."""
    end, friend = End("end"), End("friend")
    end.transport.admit("friend")
    friend.transport.connect(end.transport.endpoint(), 10.0)
    yield end, friend
    friend.transport.close()
    end.transport.close()


def admitted(end: End) -> str:
    name = f"x{next(NAMES)}"
    end.transport.admit(name)
    return name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_bytes_that_are_no_endpoint_are_refused_in_a_sentence(data: bytes) -> None:
    with pytest.raises(TransferError):
        read_endpoint(data, "tcp", {"regions": list})


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["incarnation", "regions", "host", "port", "key", "lane"]), JSON),
    st.sampled_from([VERSION, VERSION, VERSION, str(VERSION), float(VERSION), True, None, 1]),
)
def test_an_endpoint_is_read_with_the_right_types_or_refused(fields: dict[str, Any], version: Any) -> None:
    types = {"regions": list, "host": str, "port": int, "key": bytes}
    data = json.dumps({"transport": "tcp", "version": version, **fields}).encode()
    refused = ""
    try:
        read = read_endpoint(data, "tcp", types)
        sizes = read_sizes(read["regions"])
    except TransferError as error:
        refused = error.message
    if refused:
        assert re.search("incarnation|regions|host|port|key|version|malformed", refused)
        return
    assert type(version) is int
    assert {name: type(read[name]) for name in types} == types
    assert type(read["incarnation"]) is str
    assert all(type(size) is int and 0 <= size < 2**63 for size in sizes)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(TransferError, match="lacks key"):
        check_fields({"host": ""}, "tcp", {"host": str, "key": bytes})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"version": 1}, "version 1, not of tcp version"),
        ({"transport": "shm"}, "is of transport shm"),
        ({"token": None}, "lacks token"),
        ({"token": 5}, "token .* is int, not str"),
        ({"token": "wrong"}, "wrong cluster token"),
        ({"lane": True}, "lane .* is bool, not int"),
        ({"lanes": "2"}, "lanes .* is str, not int"),
        ({"lanes": 0}, "lanes: 0, not 1 to 16"),
        ({"lanes": 10**30}, "lanes: 1000"),
        ({"session": []}, "session .* is list, not str"),
        ({"lane": 1}, "lane: incarnation x.* has no connection"),
        ({"lane": -1}, "lane: incarnation x.* has no connection"),
        ({"incarnation": "nobody"}, "incarnation nobody is not expected"),
        (commit(1, b"tag"), "begins with HELLO"),
        (frame(Kind.HELLO, b"\x80\x04."), "malformed endpoint"),
        (frame(Kind.HELLO, b""), "malformed endpoint"),
    ],
)
def test_a_malformed_hello_is_refused_by_name(ends: tuple[End, End], said: Any, why: str) -> None:
    end, friend = ends
    stranger = Stranger(end)
    stranger.say(said if isinstance(said, bytes) else hello(**{"incarnation": admitted(end), **said}))
    assert re.search(why, refusal(stranger.leave()))
    end.goes_on(friend)


BAD_FRAMES = {
    "a region that is not there": (write([(1, 0, 4)], b"abcd"), "remote region 1"),
    "a negative region": (write([(-1, 0, 4)], b"abcd"), "remote region -1"),
    "bytes past the end": (write([(0, SIZE - 3, 4)], b"abcd"), f"4 bytes at {SIZE - 3}"),
    "bytes before the beginning": (write([(0, -1, 4)], b"abcd"), "4 bytes at -1"),
    "a sum that overflows": (write([(0, 2**63 - 2, 4)], b"abcd"), "lies outside"),
    "a negative length": (write([(0, 0, 8), (0, 8, -4)], b"abcd"), "negative length"),
    "segments that overlap": (write([(0, 0, 4), (0, 3, 4)], b"abcdefgh"), "segments 0 and 1 overlap"),
    "bulk that is longer than the table": (write([(0, 0, 4)], b"abcde"), "WRITE of 4 bytes brings 5"),
    "half a table": (frame(Kind.WRITE, WRITE_HEAD.pack(1, 1) + b"x" * 23, b"abcd"), "malformed table"),
    "a table without a head": (frame(Kind.WRITE, b"abc", b"abcd"), "malformed table"),
    "lanes that nobody announced": (write([(0, 0, 4)], b"abcd", lanes=3), "WRITE on 3 lanes"),
    "no lanes": (write([(0, 0, 4)], b"abcd", lanes=0), "WRITE on 0 lanes"),
    "a WRITE without its bulk": (write([(0, 0, 4)]), "brings bulk with a WRITE"),
    "a long tag": (commit(1, b"t" * 49), "tag of 49 bytes, 48 at most"),
    "a COMMIT without an id": (frame(Kind.COMMIT, b"1234567"), "kind 3 of 7 bytes"),
    "a COMMIT with bulk": (frame(Kind.COMMIT, ID.pack(1), b"bulk"), "kind 3 brings 4 bytes of bulk"),
    "a fence of three bytes": (frame(Kind.FENCED, b"123"), "kind 4 of 3 bytes"),
    "a second HELLO": (hello("again"), "kind 1"),
    "an answer": (frame(Kind.ACK, ID.pack(1)), "kind 18"),
    "an unknown kind": (frame(99, b"?"), "kind 99"),
    "a body without end": (HEADER.pack(Kind.COMMIT, MAX_BODY + 1, 0), "claims a body of 16777217"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_of_an_admitted_peer_ends_it_by_name(ends: tuple[End, End], name: str) -> None:
    end, friend = ends
    data, why = BAD_FRAMES[name]
    stranger, peer = Stranger(end), admitted(end)
    stranger.say(hello(peer) + write([(0, 100, 3)], b"abc") + commit(1, b"good") + data + commit(2, b"late"))
    stranger.leave()
    assert re.search(why, end.down(peer))
    assert bytes(end.pool[100:103]) == b"abc"
    assert not [event for event in end.events if getattr(event, "tag", b"") == b"late"]
    end.goes_on(friend)


def test_lanes_are_taken_once_with_their_session_and_as_many_as_announced(ends: tuple[End, End]) -> None:
    end, friend = ends
    first, peer = Stranger(end), admitted(end)
    first.say(hello(peer, lanes=3))
    session = first.welcome()["session"]
    for lane, shown, why in (
        (1, "", "session: lane 1"),
        (3, session, "lane: 3 of .* not one of the 3"),
        (1, session, None),
        (1, session, "lane: 1 of .* is there"),
        (0, session, "not expected here"),
    ):
        stranger = Stranger(end)
        stranger.say(hello(peer, lane=lane, session=shown))
        kind, body = stranger.answer()
        if why is None:
            assert kind == Kind.WELCOME
            second = stranger
        else:
            assert kind == Kind.REFUSED
            assert re.search(why, body.decode())
            stranger.leave()
    # A stripe of each lane; the tag comes when both are whole.
    first.say(write([(0, 200, 3)], b"abc", lanes=2) + commit(1, b"both"))
    first.say(commit(0, b"behind"))
    end.goes_on(friend)
    assert not [event for event in end.events if getattr(event, "peer", "") == peer]
    second.say(write([(0, 203, 3)], b"def", lanes=2) + commit(1))
    end.until(
        lambda: (
            [e.tag for e in end.events if isinstance(e, Notified) and e.peer == peer] == [b"both", b"behind"]
        )
    )
    assert bytes(end.pool[200:206]) == b"abcdef"
    # One that is taken back holds nobody up.
    first.say(write([(0, 0, 3)], b"xyz", transfer_id=2, lanes=2) + commit(2, b"torn") + commit(0, b"after"))
    first.say(frame(Kind.CANCEL, ID.pack(2)))
    end.until(lambda: any(getattr(e, "tag", b"") == b"after" for e in end.events))
    assert not any(getattr(e, "tag", b"") == b"torn" for e in end.events)
    second.say(commit(1, b"tag"))
    assert "COMMIT on lane 1 has a tag" in end.down(peer)
    assert first.leave() is not None
    second.leave()
    end.goes_on(friend)


NUMBERS = st.sampled_from([0, 1, 8, SIZE - 1, SIZE, SIZE + 1, -1, 2**31, 2**63 - 1, -(2**63)])
ROWS = st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, -1]), NUMBERS, NUMBERS), max_size=3)
WRITES = st.builds(write, ROWS, st.binary(max_size=30), st.sampled_from([0, 1, 2**64 - 1]), st.integers(0, 3))
FRAMES = st.builds(
    frame,
    st.integers(0, 25),
    st.binary(max_size=80),
    st.binary(max_size=40),
    st.none() | st.sampled_from([0, 1, 2**40, 2**64 - 1]),
)


@FUZZ
@given(
    st.lists(WRITES | FRAMES | st.binary(max_size=60) | st.just(commit(3, b"tag")), max_size=5), st.booleans()
)
def test_any_bytes_at_all_harm_nobody(ends: tuple[End, End], chunks: list[bytes], known: bool) -> None:
    end, friend = ends
    stranger, peer = Stranger(end), admitted(end)
    if known:
        stranger.say(hello(peer))
    stranger.say(b"".join(chunks))
    stranger.leave()
    if known:
        assert end.down(peer)
    end.goes_on(friend)


ANSWERS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "no endpoint": (frame(Kind.WELCOME, b"[]"), "malformed endpoint"),
    "a pickle": (frame(Kind.WELCOME, pickle.dumps({"regions": [SIZE]})), "malformed endpoint"),
    "no regions": ({"regions": None}, "lacks regions"),
    "regions of text": ({"regions": ["8192"]}, "regions: '8192' is no size"),
    "regions smaller than announced": ({"regions": [SIZE - 1]}, "regions of .* were announced"),
    "no session": ({"session": None}, "lacks session"),
    "another incarnation": ({"incarnation": "other"}, "incarnation other answers"),
    "another version": ({"version": 99}, "version 99"),
    "an ACK before the WELCOME": (frame(Kind.ACK, ID.pack(1)), "kind 18"),
    "a COMMIT": (commit(1), "kind 3"),
    "a refusal that is no text": (frame(Kind.REFUSED, b"\xff\xfe"), "refuses the connection"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_destination_is_down_by_name_and_its_writer_goes_on(
    ends: tuple[End, End], name: str
) -> None:
    end, friend = ends
    said, why = ANSWERS[name]
    peer = f"x{next(NAMES)}"
    fields = {"transport": "tcp", "version": VERSION, "incarnation": peer, "regions": [SIZE], "session": "s"}
    if isinstance(said, dict):
        changed = {k: v for k, v in {**fields, **said}.items() if v is not None}
        answer = frame(Kind.WELCOME, json.dumps(changed).encode())
    else:
        answer = said
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        friend.transport.connect(json.dumps({**fields, "host": host, "port": port}).encode(), 10.0)
        sock, _ = listener.accept()
        with sock:
            sock.sendall(answer)
            assert re.search(why, friend.down(peer))
    end.goes_on(friend)


@FUZZ
@given(st.lists(FRAMES | st.binary(max_size=60) | st.just(frame(Kind.ACK, ID.pack(7))), max_size=4))
def test_any_answer_at_all_harms_nobody(ends: tuple[End, End], chunks: list[bytes]) -> None:
    end, friend = ends
    peer = f"x{next(NAMES)}"
    fields = {"transport": "tcp", "version": VERSION, "incarnation": peer, "regions": [SIZE], "session": "s"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        friend.transport.connect(json.dumps({**fields, "host": host, "port": port}).encode(), 10.0)
        sock, _ = listener.accept()
        with sock:
            sock.sendall(frame(Kind.WELCOME, json.dumps(fields).encode()) + b"".join(chunks))
            sock.shutdown(socket.SHUT_WR)
            assert friend.down(peer)
    end.goes_on(friend)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


def test_nothing_that_comes_is_unpickled(ends: tuple[End, End], capsys: pytest.CaptureFixture[str]) -> None:
    end, friend = ends
    bomb = pickle.dumps(_Bomb())
    peer = admitted(end)
    for data in (
        frame(Kind.HELLO, bomb),
        hello(peer) + commit(0, bomb[:48]),
        hello(peer) + frame(Kind.WRITE, bomb, b"x"),
        struct.pack("<I", len(bomb)) + bomb,
    ):
        stranger = Stranger(end)
        stranger.say(data)
        stranger.leave()
    end.goes_on(friend)
    assert capsys.readouterr().out == ""
    modules = Path(sys.modules[End.__module__].__file__ or "").parents[3] / "kv_transfer"
    found = subprocess.run(
        [
            "grep",
            "-lE",
            r"(import|from) (c?[pP]ickle|marshal)|\beval\(|\bexec\(|pickle\.load|serialize_descs\(",
            *modules.rglob("*.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""

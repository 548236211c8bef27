"""What this machine cannot give is said before anything is started."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from diphase.cluster import foundation as module
from diphase.cluster.actors import open_log_dir
from diphase.cluster.config import load
from diphase.cluster.foundation import foundation
from diphase.proto.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(module, "Watchdog", start)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("supervisor.log_dir=/proc/nope", r"supervisor\.log_dir = '/proc/nope' cannot be written: No such"),
        ("supervisor.log_dir=/proc", r"supervisor\.log_dir = '/proc' cannot be written"),
        ("supervisor.log_dir=/dev/null", r"supervisor\.log_dir = '/dev/null' cannot be written"),
        ('supervisor.log_dir="/tmp/a\\u0000b"', r"supervisor\.log_dir = .* cannot be written"),
        ("ray.object_store_mib=1000000000", r"ray\.object_store_mib = 1000000000 is more than the \d+ MiB"),
    ],
)
def test_what_the_machine_cannot_give_is_refused_with_the_key(setting: str, complaint: str) -> None:
    config = load(None, [setting], random.Random(0))
    with pytest.raises(ConfigError, match=complaint), foundation(config):
        pass


def test_the_folder_of_the_logs_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    open_log_dir(str(folder))
    open_log_dir(str(folder))
    assert list(folder.iterdir()) == []
    open_log_dir("")

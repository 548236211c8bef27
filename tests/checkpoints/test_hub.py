"""The Hub's side is played by a server on this machine; the client is the real library in a process of its
own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, acme/tiny; acme/gated needs permission, others do not exist."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.served: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith("/api/models/acme/gated"):
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if path.startswith("/api/models/acme/broken"):
            return self.reply(400, b"", {}, body)
        if path.startswith("/api/models/acme/tiny/revision/absent"):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if path.startswith("/api/models/acme/tiny/"):
            return self.reply(200, self.listing(path), {}, body)
        prefix = f"/acme/tiny/resolve/{COMMIT}/"
        if path.startswith(prefix):
            name = path.removeprefix(prefix)
            if body:
                self.server.served.append(name)
            content = (self.server.folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, content, headers, body)
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def listing(self, path: str) -> bytes:
        files = sorted(self.server.folder.iterdir())
        if "/tree/" in path:
            return json.dumps(
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
            ).encode()
        siblings = [{"rfilename": file.name} for file in files]
        return json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode()

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(make: Any) -> Iterator[Hub]:
    path = make.directory("repository", num_shards=2, files={"chat_template.jinja": "{{ messages }}"})
    for surplus in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (path / surplus).write_bytes(b"not wanted")
    with Hub(path) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def resolve(name: str, home: Path, **environment: str) -> str:
    """What resolve(name) reports in a process with that environment."""
    code = """
import sys
from diphase.checkpoints.lookup import resolve
from diphase.proto.errors import CheckpointError
stages = []
try:
    files = resolve(sys.argv[1], progress=lambda stage, share: stages.append((stage, share)))
    print(files.config.num_layers, sorted(f.name for f in files.path.iterdir()), stages)
except CheckpointError as error:
    print("refused:", error)
"""
    settings = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, name],
        env=settings,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WANTED = [
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


def test_a_repository_is_fetched_once_and_only_what_is_read(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    stages = "[('fetching acme/tiny', 0.0), ('fetching acme/tiny', 1.0)]"
    expected = f"2 {WANTED} {stages}\n"
    assert resolve("acme/tiny", tmp_path / "home", HF_ENDPOINT=endpoint) == expected
    assert sorted(hub.served) == WANTED
    hub.served.clear()
    assert resolve("acme/tiny", tmp_path / "home", HF_ENDPOINT=endpoint) == expected
    assert hub.served == []
    assert resolve("acme/tiny", tmp_path / "home", HF_HUB_OFFLINE="1") == expected
    assert resolve("acme/tiny", tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme/absent", "refused: acme/absent is neither a directory here nor a repository on the Hub"),
        ("acme/gated", "refused: acme/gated needs permission: accept its terms"),
        ("acme/tiny@absent", "refused: acme/tiny has no revision 'absent'; name a branch"),
        ("acme/--tiny", "refused: 'acme/--tiny' is no name that a repository can have"),
        ("acme/broken", "refused: acme/broken"),
    ],
)
def test_what_the_hub_refuses_is_said(hub: Hub, tmp_path: Path, name: str, message: str) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    assert message in resolve(name, tmp_path / "home", HF_ENDPOINT=endpoint)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_it_says_what_to_do(tmp_path: Path, environment: dict[str, str]) -> None:
    output = resolve("acme/tiny", tmp_path / "home", **environment)
    assert output.startswith("refused: acme/tiny is not in the local Hub cache and the Hub cannot be reached")
    assert "or name a model directory or a .gguf file" in output


def test_a_repository_that_lacks_files_names_them(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "tokenizer.json").unlink()
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    assert "lacks tokenizer.json" in resolve("acme/tiny", tmp_path / "home", HF_ENDPOINT=endpoint)

"""The hub's answers as one line each: real clients against a small server on 127.0.0.1, and against nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import script

from kit.hub import loadable

SECRET = "hf_" + "x" * 30


class Hub(BaseHTTPRequestHandler):
    """Answers by the name that is asked for: gated/... wants a licence, anything else is not there."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response((403 if self.headers.get("Authorization") else 401) if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def data(tmp_path: Path, endpoint: str, *flags: str, **env: str) -> str:
    """What scripts/data.py says on stderr when it fails with exit code 2."""
    clean = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"} | env
    done = script("data", "--data-dir", str(tmp_path / "data"), *flags, env=clean)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not (tmp_path / "data" / "tiny").exists()
    assert SECRET not in done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1]


GATED = "is gated or private: accept its licence on its page and set HF_TOKEN to your access token"


def test_a_gated_dataset_without_a_token_and_with_one_whose_licence_is_not_accepted(hub: str, tmp_path: Path) -> None:
    for token in ("", SECRET):
        assert data(tmp_path, hub, "--source", "alpaca=gated/data", HF_TOKEN=token) == f"error: dataset gated/data {GATED}"


def test_a_gated_model(hub: str, tmp_path: Path) -> None:
    assert data(tmp_path, hub, "--recipe", "tiny", "--model", "gated/model") == f"error: model gated/model {GATED}"


def test_a_dataset_that_is_not_there(hub: str, tmp_path: Path) -> None:
    assert data(tmp_path, hub, "--source", "tulu=no/such") == "error: dataset no/such was not found on the hub; check its name and revision"


def test_no_network(tmp_path: Path) -> None:
    # Port 9 of this machine: nothing listens there.
    message = data(tmp_path, "http://127.0.0.1:9", "--recipe", "t4")
    assert message == ("error: dataset tatsu-lab/alpaca is not in the local cache and the hub cannot be reached; check the network, or use --recipe tiny")


def test_gemma_goes_through_unsloths_table_to_an_ungated_mirror() -> None:
    assert loadable("google/gemma-3-1b-it") == "unsloth/gemma-3-1b-it"
    assert loadable("no/mirror") == "no/mirror"

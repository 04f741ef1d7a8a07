"""The real hub clients against a small hub on 127.0.0.1, and against nothing at all: what works, and each failure as one line."""

from __future__ import annotations

import errno
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import script
from hub_server import SHA, TOKEN, Hub, Repo

from kit.errors import UserError
from kit.files import read_json
from kit.hub import BUILTIN, Unreachable, hub_errors, loadable

GATED = "is gated or private: accept its licence on its page and set HF_TOKEN to your access token"
UNREACHABLE = "is not in the local cache and the hub cannot be reached; check the network, or use --recipe tiny"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def rows(n: int, note: int = 0) -> bytes:
    """n distinct conversations as JSONL, each with `note` bytes beside it that no stage reads."""
    rng = random.Random(0)
    text = lambda: " ".join(str(rng.random()) for _ in range(6))  # noqa: E731
    turns = [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(n)]
    return "".join(json.dumps({"id": str(i), "messages": t, "note": "x" * note}) + "\n" for i, t in enumerate(turns)).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({"lab/open": Repo({"train.jsonl": rows(60)}), "lab/gated": Repo({"train.jsonl": rows(60)}, gated=True)})
    yield server
    server.shutdown()
    server.server_close()


class Client:
    """A script, scripts/data.py unless told, with a cache of its own; nothing it prints may hold the token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, endpoint: str, *flags: str, script_name: str = "data", **env: str) -> tuple[int, str, str]:
        clean = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_OFFLINE": "0",
        } | env
        small = ("--train-per-source", "20", "--test-per-source", "10")
        done = script(script_name, "--data-dir", str(self.folder / "data"), *small, *flags, env=clean)
        assert TOKEN not in done.stdout + done.stderr
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return done.returncode, error[-1] if error else done.stderr[-1500:], done.stdout

    def manifest(self, name: str = "tiny") -> dict[str, object]:
        return dict(read_json(self.folder / "data" / name / "manifest.json"))


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def test_a_public_dataset_is_pinned_and_later_read_from_the_cache(hub: Hub, client: Client) -> None:
    hub.repos["lab/open"].delay_s = 0.03  # a slow hub is waited for
    flags = ("--source", "tulu=lab/open")
    code, error, _ = client(hub.endpoint, *flags)
    assert code == 0, error
    source = client.manifest()["sources"]["tulu"]  # type: ignore[index]
    assert (source["revision"], source["rows_in"], source["train"], source["test"]) == (SHA, 60, 20, 10)
    code, error, said = client(NOWHERE, *flags, "--name", "cached")
    assert code == 0, error
    assert f"comes from the local cache, commit {SHA[:12]}" in said
    assert client.manifest("cached")["files"] == client.manifest()["files"]


PARTS = b"""---
configs:
- config_name: main
  data_files:
  - split: test
    path: main/test.jsonl
- config_name: other
  data_files: other.jsonl
---
"""


def test_a_dataset_of_ones_own_and_its_subsets(hub: Hub, client: Client) -> None:
    asked = b"".join(json.dumps({"question": f"what is {i} and {i * i}", "answer": f"that is {i * 7}"}).encode() + b"\n" for i in range(60))
    hub.repos["lab/parts"] = Repo({"README.md": PARTS, "main/test.jsonl": asked, "other.jsonl": b"{}\n"})
    code, error, said = client(hub.endpoint, "--source", "sums=lab/parts:main:test")
    assert code == 0, error
    assert "source sums: read as instruction, from question, answer" in said
    source = client.manifest()["sources"]["sums"]  # type: ignore[index]
    assert (source["origin"], source["part"], source["revision"], source["rows_in"]) == ("lab/parts", "main:test", SHA, 60)


def test_a_subset_must_be_named() -> None:
    said = "Config name is missing.\nPlease pick one among the available configs: ['main', 'other']\nExample of usage:\n\t`load_dataset('x', 'main')`"
    expected = "it has subsets, and one must be named as OWNER/DATASET:SUBSET:SPLIT; Please pick one among the available configs: ['main', 'other']"
    with pytest.raises(UserError, match=re.escape(f"dataset x cannot be loaded: {expected}")), hub_errors("dataset x"):
        raise ValueError(said)


def test_what_is_in_a_datasets_files_is_said(hub: Hub, client: Client) -> None:
    hub.repos["lab/script"] = Repo({"script.py": b"import datasets"})
    hub.repos["lab/broken"] = Repo({"train.jsonl": rows(60)[:-20]})
    for name, said in (("script", "Dataset scripts are no longer supported, but found script.py"), ("broken", "JSON parse error")):
        code, error, _ = client(hub.endpoint, "--source", f"tulu=lab/{name}")
        assert code == 2, error
        assert error.startswith(f"error: dataset lab/{name} cannot be loaded: ")
        assert said in error


def test_gated_before_and_after_the_licence_is_accepted(hub: Hub, client: Client) -> None:
    flags = ("--source", "tulu=lab/gated")
    for token in ("", TOKEN):
        assert client(hub.endpoint, *flags, HF_TOKEN=token)[:2] == (2, f"error: dataset lab/gated {GATED}")
    assert not (client.folder / "data" / "tiny").exists()
    hub.repos["lab/gated"].accepted = True
    code, error, _ = client(hub.endpoint, *flags, HF_TOKEN=TOKEN)
    assert code == 0, error
    found = [p for p in (client.folder / "data").rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert found == []


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub, client: Client) -> None:
    # The client writes blocks of 10 MB, so that is the least it can go on from.
    hub.repos["lab/open"] = Repo({"train.jsonl": rows(60, note=200_000)}, break_after=11_000_000)
    code, error, _ = client(hub.endpoint, "--source", "tulu=lab/open", HF_HUB_DISABLE_XET="1")
    assert code == 0, error
    assert hub.broken == {"train.jsonl"}
    assert any(start > 0 for start in hub.ranges), hub.ranges
    assert client.manifest()["sources"]["tulu"]["rows_in"] == 60  # type: ignore[index]


def test_what_is_not_there(hub: Hub, client: Client) -> None:
    error = "error: dataset no/such was not found on the hub; check its name and revision"
    private = "; if it is private, set HF_TOKEN to an access token that may read it"
    assert client(hub.endpoint, "--source", "tulu=no/such")[:2] == (2, error + private)
    assert client(hub.endpoint, "--source", "tulu=no/such", HF_TOKEN=TOKEN)[:2] == (2, error)


def test_a_gated_model(hub: Hub, client: Client) -> None:
    assert client(hub.endpoint, "--recipe", "tiny", "--model", "lab/gated")[:2] == (2, f"error: model lab/gated {GATED}")


def test_a_model_of_the_hub_is_trained(hub: Hub, client: Client) -> None:
    """The command on kit/README.md, with the built-in model's files under that name. (An empty token is no token.)"""
    name = "HuggingFaceTB/SmolLM2-360M-Instruct"
    hub.repos[name] = Repo({p.name: p.read_bytes() for p in BUILTIN["builtin"].iterdir()})
    short = ("--limit-train", "24", "--max-steps", "2", "--test-per-source", "4", "--valid-per-source", "0", "--runs-dir", str(client.folder / "runs"))
    code, error, said = client(hub.endpoint, "--model", name, "--name", "smol", *short, script_name="train")
    assert code == 0, error
    assert f"loading {name} in 4-bit NF4, computing in float32" in said.replace("\n", " ")
    run = client.folder / "runs" / "smol" / "qlora-s0"
    assert read_json(run / "train.json")["steps"] == 2
    assert read_json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == name
    began = time.monotonic()
    code, error, said = client(NOWHERE, "--model", name, "--name", "cached", *short)
    assert code == 0, error
    assert f"model {name} comes from the local cache, commit {SHA[:12]}" in said.replace("\n", " ")
    assert time.monotonic() - began < 60  # no retries for each file that a tokenizer might have


def test_no_network_and_nothing_cached(client: Client) -> None:
    for offline in ("0", "1"):
        code, error, _ = client(NOWHERE, "--recipe", "t4", HF_HUB_OFFLINE=offline)
        assert (code, error) == (2, f"error: dataset tatsu-lab/alpaca {UNREACHABLE}")


def test_an_answer_that_is_none_is_told_from_silence() -> None:
    """A proxy's, or the hub's to too many requests: the client hides it behind a file that is not in the cache."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    answer = httpx.Response(502, request=httpx.Request("HEAD", "http://127.0.0.1"))
    for error in (LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"), None):
        with pytest.raises(Unreachable, match=r"the hub cannot be reached \(it answers 502\); check the network"), hub_errors("model a/b"):  # noqa: PT012
            try:
                raise HfHubHTTPError("Bad Gateway", response=answer)
            except HfHubHTTPError as bad:
                raise (error or bad) from (bad if error else None)


@pytest.mark.parametrize("name", ["ReadError", "RemoteProtocolError", "ProxyError", "PoolTimeout"])
def test_a_connection_that_drops_is_no_network(name: str) -> None:
    import httpx

    with pytest.raises(Unreachable, match="the hub cannot be reached; check the network"), hub_errors("model a/b"):
        raise getattr(httpx, name)("Connection reset by peer")


def test_an_error_of_datasets_without_words_keeps_its_name() -> None:
    from datasets.exceptions import DatasetGenerationError

    with pytest.raises(UserError, match="while generating the dataset: AssertionError"), hub_errors("dataset a/b"):  # noqa: PT012
        try:
            raise AssertionError
        except AssertionError as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error


def test_half_a_model_in_the_cache_is_not_called_a_model_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model a/b is not in the local cache"), hub_errors("model a/b"):
        raise OSError("a/b does not appear to have a file named model.safetensors or model.safetensors.index.json and thus cannot be loaded")


def test_a_disk_that_is_full_keeps_its_name() -> None:
    """datasets hides it behind an error of its own."""
    with pytest.raises(UserError, match="the disk is full while fetching dataset lab/x; free some, or set HF_HOME"), hub_errors("dataset lab/x"):  # noqa: PT012
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise ValueError("An error occurred while generating the dataset") from full


def test_a_token_that_the_hub_refuses_is_called_that() -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    answer = httpx.Response(401, request=httpx.Request("GET", "http://127.0.0.1"))
    with pytest.raises(UserError, match="the hub refuses HF_TOKEN, which may have expired"), hub_errors("model a/b"):
        raise HfHubHTTPError("Invalid credentials in Authorization header", response=answer)


def test_gemma_goes_through_unsloths_table_to_an_ungated_mirror() -> None:
    assert loadable("google/gemma-3-1b-it") == "unsloth/gemma-3-1b-it"
    assert loadable("no/mirror") == "no/mirror"
    assert loadable("google/gemma-3-1b-it", "a" * 40) == "google/gemma-3-1b-it"  # the mirror has no such commit

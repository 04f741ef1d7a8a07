"""The model and data hub: names, commits, and its errors as one line that says what to do."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import os
import runpy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.console import say
from kit.errors import UserError, first_line

BUILTIN = {"builtin": Path(__file__).parent / "assets" / "model", "builtin-gptneo": Path(__file__).parent / "assets" / "gptneo"}

PLACES = 512  # of which gemma-3-1b's queries, a thirtieth of it, have 13
WAIT = 10  # seconds for an answer; the libraries would wait for ever
# What the network's own errors are called, of huggingface_hub and of httpx below it.
NETWORK = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError", "WriteTimeout", "PoolTimeout", "ProxyError", "RemoteProtocolError",
           "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}  # fmt: skip
NO_TOKENIZER = "it has no tokenizer that can be read, such as a tokenizer.json; of an adapter, give the model that it was made for"


class Unreachable(UserError):
    """No network, or told to stay offline, and nothing cached."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns a failed download into a UserError: gated, missing, no network, or the library's own first line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        answered = ""
        for link in chain:
            status = getattr(getattr(link, "response", None), "status_code", None)
            if isinstance(link, errors.GatedRepoError) or status == 403:
                raise UserError(f"{what} is gated or private: accept its licence on its page and set HF_TOKEN to your access token") from None
            if isinstance(link, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
                # To somebody without a token the hub does not tell a private repository from one that is not there.
                private = "; if it is private, set HF_TOKEN to an access token that may read it" if status == 401 else ""
                raise UserError(f"{what} was not found on the hub; check its name and revision{private}") from None
            answered = f" (it answers {status})" if status and status >= 429 else answered
            if status == 401:
                raise UserError(f"{what}: the hub refuses HF_TOKEN, which may have expired; make a new one, or unset it for what is public") from None
            if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(link):
                raise UserError(f"the disk is full while fetching {what}; free some, or set HF_HOME to a folder on a larger disk") from None
        names = {type(link).__name__ for link in chain}
        half = constants.HF_HUB_OFFLINE and "appear to have a file named model.safetensors" in str(error)
        if answered or half or names & NETWORK:
            raise Unreachable(f"{what} is not in the local cache and the hub cannot be reached{answered}; check the network, or use --recipe tiny") from None
        known = any(word in type(error).__name__ for word in ("Dataset", "Safetensor")) or str(error).startswith("Dataset scripts")
        if known or isinstance(error, (OSError, ValueError)):
            reason, more = first_line(error), str(error).strip().splitlines()[1:]
            if reason.startswith("An error occurred while generating") and len(chain) > 1:
                reason += f": {first_line(chain[1])}"
            if reason.startswith("Config name is missing"):
                reason = f"it has subsets, and one must be named as OWNER/DATASET:SUBSET:SPLIT; {' '.join(more[:1])}"
            if reason.startswith("Unrecognized model in") or "a file named config.json" in reason:
                reason = "it has no config.json that names an architecture; of an adapter, give the model that it was made for"
            if "file named model.safetensors" in reason:
                reason = "it has no weights in safetensors, the only ones that are read"
            if reason.startswith("Couldn't instantiate the backend tokenizer"):
                reason = NO_TOKENIZER
            raise UserError(f"{what} cannot be loaded: {reason}") from None
        raise


def commit_of(dataset: str) -> str:
    """The commit of a dataset's main branch, so that the manifest pins it; without a network the newest commit in the local cache."""
    from huggingface_hub import HfApi, constants

    try:
        with hub_errors(f"dataset {dataset}"):
            sha: str | None = HfApi().dataset_info(dataset, timeout=WAIT).sha
    except Unreachable:
        snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{dataset.replace('/', '--')}", "snapshots").glob("*")
        newest = max(snapshots, key=lambda p: p.stat().st_mtime, default=None)
        if newest is None:
            raise
        _stay_offline(f"dataset {dataset}", newest.name)
        return newest.name
    if sha is None:
        raise UserError(f"dataset {dataset}: the hub names no commit")
    return sha


def _stay_offline(what: str, commit: str) -> None:
    """From here on nobody tries again: each library would wait through its own retries, for each file that a model might have."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    say(f"the hub cannot be reached: {what} comes from the local cache, commit {commit[:12]}")


def dataset_rows(dataset: str, part: Sequence[str], revision: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset's split, `part` being [split] or [subset, split], at a commit."""
    from datasets import load_dataset

    with hub_errors(f"dataset {dataset}"):
        rows = load_dataset(dataset, *part[:-1], split=part[-1], revision=revision)
    yield from rows


def loadable(model: str, revision: str = "") -> str:
    """The name to load: a built-in model is its shipped folder, and a hub id goes through Unsloth's table of ungated 16-bit mirrors.

    A revision is one of the repository that was named: no mirror has it.
    """
    if model in BUILTIN:
        return str(BUILTIN[model])
    if (folder := Path(model).expanduser()).is_dir():
        return str(folder)
    if model.startswith(("/", ".", "~")):
        raise UserError(f"no such model folder: {model}")
    return model if revision else _mirrors().get(model.lower(), model)


def state(folder: Path) -> str:
    """A model folder as it is now: SHA-256 of its files, but of weights of their size and a page in each of PLACES.

    To read several GB whole would take a minute at each stage, and training on changes weights in every layer. What is no file, or may not be read, no
    model was loaded from.
    """
    digest = hashlib.sha256()
    names = (p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".safetensors", ".txt"))
    for path in sorted(p for p in names if p.is_file() and os.access(p, os.R_OK)):
        size, weights = path.stat().st_size, path.suffix == ".safetensors"
        digest.update(os.fsencode(f"{path.name} {size}\n"))
        with path.open("rb") as file:
            for place in range(PLACES if weights else 1):
                file.seek(size * place // PLACES)
                digest.update(file.read(4096 if weights else size))
    return digest.hexdigest()


def loaded_from(model: str, revision: str = "") -> tuple[str, str | None]:
    """(repository, commit in the local cache) that a model's name and revision stand for; a folder has no commit."""
    from huggingface_hub import try_to_load_from_cache

    source = loadable(model, revision)
    cached = None if Path(source).is_dir() else try_to_load_from_cache(source, "config.json", revision=revision or "main")
    return source, Path(cached).parent.name if isinstance(cached, str) else None


@functools.cache
def reach(model: str, revision: str = "") -> None:
    """Asks the hub once about a model that is in the local cache, from which it comes where there is no answer."""
    from huggingface_hub import HfApi, constants

    source, commit = loaded_from(model, revision)
    if commit and not constants.HF_HUB_OFFLINE:
        try:
            with hub_errors(f"model {model}"):
                HfApi().model_info(source, revision=revision or None, timeout=WAIT)
        except Unreachable:
            _stay_offline(f"model {model}", commit)
        except UserError:  # which loading it will tell, if it matters
            pass


def _mirrors() -> dict[str, str]:
    """Unsloth's original -> 16-bit mirror table, read from its file because importing Unsloth costs 10 s and the data stage needs none of it."""
    spec = importlib.util.find_spec("unsloth")
    if spec is None or spec.origin is None:
        raise UserError("unsloth is not installed; run: make setup")
    tables = runpy.run_path(str(Path(spec.origin).with_name("models") / "mapper.py"))
    mirrors: dict[str, str] = tables["MAP_TO_UNSLOTH_16bit"]
    return mirrors


def load_tokenizer(model: str, revision: str = "") -> Any:
    """The model's tokenizer, right padding, never executing code from the hub."""
    from transformers import AutoTokenizer

    reach(model, revision)
    with hub_errors(f"model {model}"):
        tokenizer = AutoTokenizer.from_pretrained(loadable(model, revision), revision=revision or None, trust_remote_code=False)
        if not tokenizer.get_vocab().keys() - {
            str(token) for token in tokenizer.added_tokens_decoder.values()
        }:  # without its files transformers makes one of control tokens alone, for some models
            raise ValueError(NO_TOKENIZER)
        return tokenizer

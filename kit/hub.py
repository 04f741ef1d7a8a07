"""The model and data hub: names, commits, and its errors as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.errors import UserError

BUILTIN_MODEL = Path(__file__).parent / "assets" / "model"


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns a failed download into a UserError: gated, missing, no network, or the library's own first line."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        for link in chain:
            if isinstance(link, errors.GatedRepoError) or getattr(getattr(link, "response", None), "status_code", None) in (401, 403):
                raise UserError(f"{what} is gated or private: accept its licence on its page and set HF_TOKEN to your access token") from None
            if isinstance(link, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
                raise UserError(f"{what} was not found on the hub; check its name and revision") from None
        names = {type(link).__name__ for link in chain}
        if names & {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
            raise UserError(f"{what} is not in the local cache and the hub cannot be reached; check the network, or use --recipe tiny") from None
        if isinstance(error, (OSError, ValueError)) or "Dataset" in type(error).__name__:
            raise UserError(f"{what} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        raise


def commit_of(dataset: str, revision: str | None = None) -> str:
    """The commit that a dataset's revision means now, so that the manifest pins it."""
    from huggingface_hub import HfApi

    with hub_errors(f"dataset {dataset}"):
        sha: str | None = HfApi().dataset_info(dataset, revision=revision).sha
    if sha is None:
        raise UserError(f"dataset {dataset}: the hub names no commit")
    return sha


def loadable(model: str) -> str:
    """The name to load: `builtin` is the shipped folder, and a hub id goes through Unsloth's table of ungated 16-bit mirrors."""
    if model == "builtin":
        return str(BUILTIN_MODEL)
    return model if Path(model).expanduser().is_dir() else _mirrors().get(model.lower(), model)


def _mirrors() -> dict[str, str]:
    """Unsloth's original -> 16-bit mirror table, read from its file because importing Unsloth costs 10 s and the data stage needs none of it."""
    import importlib.util
    import runpy

    spec = importlib.util.find_spec("unsloth")
    if spec is None or spec.origin is None:
        raise UserError("unsloth is not installed; run: make setup")
    tables = runpy.run_path(str(Path(spec.origin).with_name("models") / "mapper.py"))
    mirrors: dict[str, str] = tables["MAP_TO_UNSLOTH_16bit"]
    return mirrors


def load_tokenizer(model: str, revision: str = "") -> object:
    """The model's tokenizer, right padding, never executing code from the hub."""
    from transformers import AutoTokenizer

    with hub_errors(f"model {model}"):
        return AutoTokenizer.from_pretrained(loadable(model), revision=revision or None, trust_remote_code=False)

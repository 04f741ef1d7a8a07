"""What tuning costs elsewhere: perplexity and KL divergence from the base model on general text, and how much of it the training rows hold."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kit import dataset
from kit.assets.compose import document
from kit.audit import WORD
from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import sha256
from kit.generation import LOGITS, autocast, cut, padded, position_ids, read_at_once
from kit.hub import Unreachable, commit_of, hub_errors
from kit.metrics import METRICS, Metric, ratio
from kit.model import free_memory, load_trained
from kit.prompts import Exam, Renderer
from kit.readers import records
from kit.resources import is_memory_error
from kit.statistics import intervals

BUILTIN, NONE = "builtin", "none"
DOCUMENTS, SEED = 128, "general text"
# A chunk and the token before it make 256; at most TOKENS are looked at, evenly spread over the text.
LENGTH, TOKENS = 255, 2**16
# Words in a row that two texts have in common only if one knows the other, as in Chowdhery et al. 2022 ("PaLM"). Of documentation of two unrelated programs
# 0.0 to 0.2% are the same, but 9 to 20% of the triples: these are those of the language.
GRAM = 8
# A text of which more than this share is in the training rows is not apart from them.
SEEN = 0.05
KL = Metric("KL", None, lambda _: np.empty((0, 2)), ratio, lambda: "mean over tokens of KL(base || run)", show=lambda x: np.maximum(x, 0), unit="nats a token")


class HubText(NamedTuple):
    """One file of a dataset at a commit, and its licence."""

    dataset: str
    revision: str
    file: str
    licence: str

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.file}@{self.revision[:12]} ({self.licence})"


HUB = {
    "wikitext": HubText("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3",
                        "wikitext-2-raw-v1/test-00000-of-00001.parquet", "CC BY-SA 3.0, GFDL"),
}  # fmt: skip


class Text(NamedTuple):
    """General text: what it is called, the SHA-256 of its file, and its documents."""

    name: str
    sha256: str
    documents: list[str]


def measured(record: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether an evaluation has what the configuration asks for."""
    block, wanted = record.get("forgetting"), config.forgetting_text
    if wanted == NONE or block is None:
        return wanted == NONE
    if wanted == BUILTIN or wanted in HUB:
        return bool(block["text"] == (HUB[wanted].name if wanted in HUB else wanted))
    return bool(block["sha256"] == sha256(_own(wanted)))


def check(config: RunConfig) -> None:
    """Raises a UserError for a file that is not there: before the training, after which it is read."""
    if config.forgetting_text not in (BUILTIN, NONE, *HUB):
        _own(config.forgetting_text)


def asked(name: str) -> str:
    """The --forgetting-text that gave a text of this name; a file of one's own is known by its name alone."""
    return next((word for word, hub in HUB.items() if hub.name == name), name)


def load(config: RunConfig) -> tuple[Text | None, str | None]:
    """The text, or None and the reason: turned off, or a hub that cannot be reached. A file that cannot be used is a UserError."""
    wanted = config.forgetting_text
    if wanted == NONE:
        return None, "turned off"
    try:
        return _load(wanted), None
    except Unreachable as error:
        reason = str(error).partition("; ")[0]
        say(f"forgetting is not measured: {reason}; the same command tries again, --forgetting-text takes a file of your own")
        return None, reason


def _load(wanted: str) -> Text:
    if wanted == BUILTIN:
        documents = list(_composed())
        return Text(wanted, hashlib.sha256("\n\n".join(documents).encode()).hexdigest(), documents)
    if wanted in HUB:
        from huggingface_hub import hf_hub_download

        hub = HUB[wanted]
        commit_of(hub.dataset)  # says at once that the hub cannot be reached; the download would try for half a minute
        with hub_errors(f"dataset {hub.dataset}"):
            path = Path(hf_hub_download(hub.dataset, hub.file, repo_type="dataset", revision=hub.revision))
        # Its rows are the lines of one text.
        return Text(hub.name, sha256(path), ["".join(str(row["text"]) for _, row in records(path) if row)])
    path = _own(wanted)
    if path.suffix == ".txt":
        try:
            documents = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, byte {error.start + 1}: not valid UTF-8") from None
    else:
        documents = []
        for number, row in records(path):
            if not isinstance(text := (row or {}).get("text"), str):
                raise UserError(f"{path}, row {number}: expected a text under the key text")
            documents.append(text)
    return Text(path.name, sha256(path), documents)


def _own(wanted: str) -> Path:
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise UserError(f"--forgetting-text: no such file: {wanted}; give a .txt, a .jsonl with a text a row, or one of {', '.join((BUILTIN, *HUB, NONE))}")
    return path


def _composed() -> Iterator[str]:
    """Plain documents of the built-in world, as the built-in model was pretrained on; those in a task's form are left to tuning."""
    rng = random.Random(SEED)
    left = DOCUMENTS
    while left:
        if not (made := document(rng)).startswith("Task: "):
            left -= 1
            yield made


def chunks(renderer: Renderer, text: Text) -> list[Exam]:
    """The text's tokens in pieces of up to LENGTH, each after the beginning-of-text token, or after its own first one where there is none."""
    length = min(LENGTH, renderer.max_length - 1)
    ids = renderer.tokenizer(text.documents, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    pieces = [document[i : i + length] for document in ids for i in range(0, len(document), length)]
    out = [Exam(renderer.bos or piece[:1], piece if renderer.bos else piece[1:], "whole") for piece in pieces]
    out = [e for e in out if e.reference_ids]
    if len(out) < 2:
        raise UserError(f"--forgetting-text {text.name} has {sum(map(len, ids))} tokens; an interval takes at least 2 chunks of {length}")
    return out[:: -(-sum(len(e.reference_ids) for e in out) // TOKENS)]


def measure(config: RunConfig, model: Any, text: Text, exams: Sequence[Exam], pad: int) -> tuple[dict[str, Any] | None, str | None]:
    """(the block of eval.json, why something in it is missing): perplexity before and after, and KL(base || run) in nats a token."""
    reason, shared = None, overlap(text, dataset.rows(config, "train"))
    for compared in (False,) if config.method == BASE else (True, False):
        say(f"measuring forgetting on general text ({text.name}){', beside the base model' if compared else ''}")
        base = table = None
        try:
            base = load_trained(dataclasses.replace(config, method=BASE))[0] if compared else None
            table = divergences(model, base, exams, pad)
        except Exception as error:
            if not is_memory_error(error):
                raise
        # Outside the handler: the exception's frames hold what did not fit.
        del base
        free_memory()
        if table is not None:
            return _block(text, table, compared) | {"overlap": shared}, reason
        reason = "out of memory with both models" if compared else "out of memory"
        say(f"forgetting: {reason}")
    return None, reason


def overlap(text: Text, rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of the text's sequences of GRAM words, each counted once, that occur in the training rows; None if no document is so long.

    Sequences end with their line, so that rows written one below the other are found; only a text of short lines is read across them.
    """
    lines = [line for document in text.documents for line in document.splitlines()]
    grams = {gram for line in lines for gram in _grams(line)} or {gram for document in text.documents for gram in _grams(document)}
    found: set[tuple[str, ...]] = set()
    for row in rows:
        found |= grams.intersection(_grams(" ".join(m["content"] for m in row["messages"])))
    return len(found) / len(grams) if grams else None


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(GRAM)), strict=False)


def _block(text: Text, table: Any, compared: bool) -> dict[str, Any]:
    tokens = table[:, 3:]
    columns = {"perplexity": table[:, 0:1]} | ({"perplexity_before": table[:, 1:2], "kl": table[:, 2:3]} if compared else {})
    metrics = {name: KL if name == "kl" else METRICS["perplexity"] for name in columns}
    found = intervals([{name: np.hstack([column, tokens]) for name, column in columns.items()}], ["text"] * len(table), metrics)["all"]
    ends = {name: {k: score[k] for k in ("value", "low", "high")} for name, score in found.items()}
    return {"text": text.name, "sha256": text.sha256, "tokens": int(tokens.sum())} | {"perplexity_before": None, "kl": None} | ends


def divergences(model: Any, base: Any | None, exams: Sequence[Exam], pad: int) -> Any:
    """float64 [chunks, 4], summed over each chunk's tokens: the model's and the base model's negative log-likelihood, KL(base || model), all in
    nats (0 without a base), and the tokens. The logits of both, [rows, tokens, vocabulary], stay within LOGITS numbers or are one row's.
    """
    models = [model] if base is None else [model, base]
    order = sorted(range(len(exams)), key=lambda i: -len(exams[i].reference_ids))
    lengths = [1 + len(exams[i].reference_ids) for i in order]
    at_once = min(read_at_once(model), LOGITS // (len(models) * model.config.get_text_config().vocab_size))
    return np.concatenate([_divergences(models, [exams[i] for i in order[batch]], pad) for batch in cut(lengths, at_once)])


def _logits(model: Any, **inputs: Any) -> Any:
    with autocast(model):
        return model(**inputs, use_cache=False).logits


def _divergences(models: Sequence[Any], exams: Sequence[Exam], pad: int) -> list[list[float]]:
    import torch

    ids, mask = padded([[*e.prompt_ids, *e.reference_ids] for e in exams], pad, models[0].device)
    keep, positions = 1 + max(len(e.reference_ids) for e in exams), position_ids(mask)
    out = []
    with torch.inference_mode():
        logits = [_logits(m, input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep) for m in models]
        for row, exam in enumerate(exams):
            target = torch.tensor(exam.reference_ids, device=ids.device)
            logs = [x[row, -len(target) - 1 : -1].float().log_softmax(-1) for x in logits]
            nlls = [-float(x.gather(-1, target[:, None]).double().sum()) for x in logs]
            kl = float(torch.nn.functional.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1).double().sum()) if len(logs) > 1 else 0.0
            out.append([nlls[0], nlls[-1], kl, float(len(target))])
    return out

"""The runs' predictions, read once: each metric's statistics and a few replies are kept, the texts are not."""

from __future__ import annotations

import gc
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kit.errors import UserError
from kit.files import read_jsonl, sha256
from kit.metrics import METRICS, Array, bleu_score, split_by
from kit.report.rows import COSTS, MEAN, SCORES, SECONDARY, Row, blank, collect, plain
from kit.statistics import intervals

NEEDED = ("id", "source", "prompt", "reference", "prediction", "nll", "nll_tokens")
SAMPLES = 2  # of each source
MANY = 50 * 2**20  # bytes of predictions from which a second process saves more than it costs
CHANGED = "predictions.jsonl was changed after scoring; rescore with scripts/eval.py --rescore"


@dataclass(frozen=True)
class Answers:
    """A run's predictions in the order of their ids: {metric: statistics [n, k]}, and the rows to be shown."""

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    statistics: Mapping[str, Array]
    samples: Mapping[str, Row]

    def of(self, ids: Sequence[str]) -> dict[str, Array]:
        """The statistics of these rows, all of which must be here."""
        if tuple(ids) == self.ids:
            return dict(self.statistics)
        at = {name: i for i, name in enumerate(self.ids)}
        picked = [at[name] for name in ids]
        return {metric: table[picked] for metric, table in self.statistics.items()}


@dataclass(frozen=True)
class Results:
    """What a report is made of: the runs' rows, a mean row for each method with several seeds, and the answers by run."""

    rows: list[Row]
    means: list[Row]
    answers: Mapping[str, Answers]

    @property
    def shown(self) -> list[Row]:
        """One row a method: its mean where there is one, in place of the runs that went into it."""
        inside = {run for m in self.means for run in m["runs"]}
        return [r for r in self.every if r["run"] not in inside]

    @property
    def every(self) -> list[Row]:
        """All runs, and before a method's first one its mean."""
        means = {m["method"]: m for m in self.means}
        return [r for row in self.rows for r in (means.pop(row["method"], None), row) if r]

    def groups(self) -> dict[str, list[Row]]:
        """The runs whose answers can be compared, by method."""
        return by_method(r for r in self.rows if r["run"] in self.answers)


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each method, in the order of its first one."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row["method"], []).append(row)
    return out


def gather(folder: Path) -> Results:
    """The results in runs/NAME. A run whose predictions are damaged, or not those that were scored, is not ranked and has the reason."""
    rows = collect(folder)
    done = by_method(r for r in rows if r["status"] == "done")
    jobs = [[(r["run"], r["predictions_sha256"], r["score_tokens"]) for r in found] for found in done.values()]
    answers: dict[str, Answers] = {}
    means = []
    with _workers([run for job in jobs for run, *_ in job]) as run_all:
        for found, (read, scores) in zip(done.values(), run_all(_method, jobs), strict=True):
            for row, answer in zip(found, read, strict=True):
                if isinstance(answer, Answers):
                    answers[row["run"]] = answer
                else:
                    row |= {"ranked": False, "reason": answer}
            means += [mean([r for r in found if r["run"] in answers], scores)] if scores else []
    return Results(rows, means, answers)


@contextmanager
def _workers(runs: Sequence[str]) -> Iterator[Any]:
    """map(), by several processes if there is much to read."""
    size = sum(p.stat().st_size for run in runs if (p := Path(run) / "predictions.jsonl").exists())
    cores = len(os.sched_getaffinity(0))
    if size < MANY or cores == 1:
        yield map
        return
    # Collecting looks through the millions of tokens that are kept, and finds nothing: they are in no cycles.
    with ProcessPoolExecutor(min(cores, 4), mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        yield pool.map


def _method(runs: Sequence[tuple[str, str | None, str]]) -> tuple[list[Answers | str], dict[str, Any] | None]:
    """The answers of one method's runs, or why there are none, and its scores over seeds and examples if there are several."""
    read = [_read(Path(run) / "predictions.jsonl", digest, tokens) for run, digest, tokens in runs]
    found = [a for a in read if isinstance(a, Answers)]
    ids = common(found)
    if len(found) < 2 or not ids or len({tokens for *_, tokens in runs}) > 1:
        return read, None
    return read, intervals([a.of(ids) for a in found], sources(found[0], ids), {m: METRICS[m] for m in SCORES})


def _read(path: Path, digest: str | None, tokens: str) -> Answers | str:
    try:
        if digest and sha256(path) != digest:
            return CHANGED
        rows = {row["id"]: row for row in read_jsonl(path) if _whole(path, row)}
        ordered = [rows[key] for key in sorted(rows)]
        if not ordered:
            return f"{path.name} is empty"
        statistics = {m: metric.statistics(ordered) for m, metric in split_by(tokens).items() if m in SCORES}
    except (UserError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{path.name} cannot be used: {error}"
    if wrong := [m for m in SCORES if not np.isfinite(statistics[m]).all()]:
        return f"{path.name} cannot be used: {METRICS[wrong[0]].title} of a row is not finite"
    return Answers(tuple(r["id"] for r in ordered), tuple(r["source"] for r in ordered), statistics, _samples(ordered))


def _whole(path: Path, row: Row) -> bool:
    if missing := [k for k in NEEDED if row.get(k) is None]:
        raise UserError(f"{path}: row {row.get('id')} has no {', '.join(missing)}")
    return True


def _samples(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows of each source whose ids have the smallest hashes: the same ones in every run, whatever order it wrote them in."""
    out: dict[str, Row] = {}
    drawn = sorted(rows, key=lambda r: hashlib.sha256(f"0 {r['id']}".encode()).hexdigest())
    for source in sorted({r["source"] for r in rows}):
        out |= {r["id"]: r for r in [r for r in drawn if r["source"] == source][:SAMPLES]}
    return out


def common(answers: Sequence[Answers]) -> list[str]:
    """The test rows that all have answered, sorted."""
    return sorted(set.intersection(*(set(a.ids) for a in answers))) if answers else []


def sources(answer: Answers, ids: Sequence[str]) -> list[str]:
    by_id = dict(zip(answer.ids, answer.sources, strict=True))
    return [by_id[name] for name in ids]


def mean(rows: Sequence[Row], scores: Mapping[str, Any]) -> Row:
    """A method's row over its seeds: scores with intervals over seeds and examples together, costs and secondary metrics as plain means."""
    first = rows[0]
    out = blank(first["method"], MEAN) | {k: first[k] for k in ("config", "provenance", "precision")}
    out |= scores["all"] | {"per_source": scores["per_source"], "runs": [r["run"] for r in rows], "status": "done"}
    out |= {k: _average([r[k] for r in rows]) for k in (*COSTS, "tokens_supervised")}
    out["ranges"] = {k: (min(found), max(found)) for k in COSTS if out[k] is not None and (found := [r[k] for r in rows])}
    made = [r["generation"] for r in rows]
    out["generation"] = {k: _average([g[k] for g in made]) for k in ("empty", "unfinished", "mean_reply_tokens")} if all(made) else None
    out["forgetting"] = _forgotten(rows)
    for metric in SECONDARY:
        value = _average([plain(r, metric) for r in rows])
        out[metric] = None if value is None else {"value": value, "low": None, "high": None}
    reasons = dict.fromkeys(r["reason"] for r in rows if r["reason"])
    out["label"] += f" ({len(rows)} seeds)"
    return out | {"ranked": all(r["ranked"] for r in rows), "reason": "; ".join(reasons) or None}


def _forgotten(rows: Sequence[Row]) -> Row | None:
    """What runs forgot on one and the same text, as means without intervals."""
    found = [r["forgetting"] for r in rows if r["forgetting"]]
    if len(found) < len(rows) or len({f["sha256"] for f in found}) > 1:
        return None
    logs = _average([None if (p := plain(f, "perplexity")) is None else math.log(p) for f in found])
    mean = {"perplexity": None if logs is None else math.exp(logs), "kl": _average([plain(f, "kl") for f in found])}
    means = {k: {"value": v, "low": None, "high": None} for k, v in mean.items()}
    return {k: found[0].get(k) for k in ("text", "sha256", "tokens", "perplexity_before")} | means


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def human(folder: Path, results: Results) -> Row | None:
    """What the raters' scores say, with each reply's own BLEU-4 and ROUGE-L beside, and of each pair of methods; None if nobody rated."""
    from kit.rating.agreement import summary
    from kit.rating.ledger import read_ratings
    from kit.rating.paired import comparisons
    from kit.report.verdicts import between

    if not (ratings := read_ratings(folder)):
        return None
    groups = results.groups()
    reasons = between(groups)
    runs = {m: [Path(r["run"]).name for r in found] for m, found in groups.items()}
    pairs = comparisons(ratings, runs, apart={pair for pair, why in reasons.items() if why})
    judged = [v | {"confounded": reasons[v["a"], v["b"]]} for v in pairs]
    return summary(ratings, _reply_scores(results)) | {"pairs": judged}


def _reply_scores(results: Results) -> dict[str, dict[tuple[str, str], float]]:
    """{metric: {(run, test row id): the reply's own score}}; scores by other tokens are on other scales, and a metric of their own."""
    out: dict[str, dict[tuple[str, str], float]] = {}
    tokens = {r["run"]: r["score_tokens"] for r in results.rows if r["run"] in results.answers}
    for name in ("bleu4", "rouge_l"):
        score = partial(bleu_score, effective=True) if name == "bleu4" else METRICS[name].score
        for run, answer in results.answers.items():
            called = METRICS[name].title + (f" by {tokens[run]} tokens" if len(set(tokens.values())) > 1 else "")
            scores = score(answer.statistics[name]).tolist()
            out.setdefault(called, {}).update(((Path(run).name, row), value) for row, value in zip(answer.ids, scores, strict=True))
    return out

"""The parts of the results that need no verdict: scores, lengths, leaks, forgetting, people, tasks, hybrids, replies, checks and
learning rates, as blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.config import BASE
from kit.forgetting import GRAM, SEEN
from kit.metrics import METRICS
from kit.report import about, people, study
from kit.report.answers import Results, by_method
from kit.report.blocks import Block, Bullets, Cell, Heading, Paragraph, Sample, Samples, Table
from kit.report.rows import COLUMNS, MISSING, SCORES, SECONDARY, Row, cell, interval, number, plain, title
from kit.report.verdicts import Verdict, both_ways


def amount(value: float | None, digits: int) -> Cell:
    """A number that a table sorts by."""
    return Cell(number(value, digits), value)


def score(row: Row, metric: str) -> Cell:
    """A score with its interval."""
    return Cell(interval(row.get(metric)), plain(row, metric))


def scores(rows: Sequence[Row]) -> list[Block]:
    """Every run and every mean over seeds, overall and by source."""
    blocks = [(r, name, block) for r in rows for name, block in {"all": r, **(r["per_source"] or {})}.items()]
    body = [[Cell(cell("label", r, None)), Cell(name), *(score(block, m) for m in SCORES)] for r, name, block in blocks]
    return [Heading("Scores with 95% intervals", 3), Table(["run", "source", *(COLUMNS[m].title for m in SCORES)], body, texts=2)]


def secondary(rows: Sequence[Row]) -> list[Block]:
    known = [r for r in rows if any(r[m] for m in SECONDARY)]
    body = [[Cell(cell("label", r, None)), *(score(r, m) for m in SECONDARY)] for r in known]
    text = "No verdicts are drawn from these. Intervals of exact match are Wilson's, of the others bootstrap ones. Over several seeds they are plain means."
    table = Table(["run", *(METRICS[m].title for m in SECONDARY)], body, wide=True)
    return [Heading("Secondary metrics", 3), Paragraph(text), table] if known else []


def audit(rows: Sequence[Row]) -> list[Block]:
    """Length, empty and unfinished replies, and the scores without the test rows that the leak audit flagged."""
    made = [r for r in rows if r["generation"]]
    if not made:
        return []
    body = [[Cell(r["label"]), amount(g["empty"], 0), amount(g["unfinished"], 0), amount(g["mean_reply_tokens"], 1), amount(plain(r, "length_ratio"), 2)]
            for r in made if (g := r["generation"])]  # fmt: skip
    by = "/".join(dict.fromkeys(r["score_tokens"] for r in made))
    heads = ["run", "empty", "unfinished", "the model's tokens a reply", f"times the reference's length ({by} tokens)"]
    out: list[Block] = [Heading("Length and leaks", 3), Table(heads, body)]
    leaky = [(r, x) for r in rows if (x := r["leaks"]) and x["flagged"]]
    tuned = {x["flagged"] for r, x in leaky if r["method"] != BASE}
    if leaky := [(r, x) for r, x in leaky if r["method"] != BASE or x["flagged"] in tuned]:  # without the same rows, or not beside them
        text = "Scores of all test rows, and without those whose prompt or first question is also in training."
        body = [[Cell(r["label"]), amount(x["flagged"], 0),
                 *(Cell(f"{number(plain(r, m), 2)} / {number(plain(x['without'] or {}, m), 2)}", plain(x["without"] or {}, m)) for m in SCORES)]
                for r, x in leaky]  # fmt: skip
        out += [Paragraph(text), Table(["run", "flagged", *(f"{COLUMNS[m].title}: all / without" for m in SCORES)], body)]
    return out


def forgetting(rows: Sequence[Row]) -> list[Block]:
    """What tuning cost on general text: perplexity before and after, and how far the run's words are from the base model's."""
    known = [r for r in rows if r["forgetting"]]
    if not known:
        return []
    out: list[Block] = [Heading("Forgetting", 3)]
    for digest in dict.fromkeys(r["forgetting"]["sha256"] for r in known):  # a text each
        those = [r for r in known if r["forgetting"]["sha256"] == digest]
        body = [[Cell(r["label"]), Cell(interval(f.get("perplexity_before"))), score(f, "perplexity"), score(f, "kl")]
                for r in those if (f := r["forgetting"])]  # fmt: skip
        first = those[0]["forgetting"]
        text = (
            f"On {first['tokens']:,} tokens of general text ({first['text']}, SHA-256 {str(digest)[:12]}): perplexity before and after, and the mean "
            "Kullback-Leibler divergence of the run's next-token probabilities from the base model's, in nats a token, with 95% bootstrap intervals "
            "over the pieces in which the text was read. " + _tuned_on([r for r in those if r["method"] != BASE] or those)
        )
        out += [Paragraph(text), Table(["run", "perplexity before", "perplexity after", "KL(base || run)"], body)]
    return out


def _tuned_on(rows: Sequence[Row]) -> str:
    """How much of a general text the training rows hold, as it was found when forgetting was measured."""
    known = sorted(x for r in rows if (x := r["forgetting"].get("overlap")) is not None)
    if not known:
        return "How much of it the training rows hold was not checked."
    least, most = (f"{100 * x:.3g}%" for x in (known[0], known[-1]))
    share = least if least == most else f"{least} to {most}, by run,"
    effect = ": tuning saw part of this text, and more may be forgotten of another" if known[-1] > SEEN else ""
    return f"Of its sequences of {GRAM} words {share} occur in the training rows{effect}."


def human(rows: Sequence[Row], rated: Row | None, found: Sequence[Verdict]) -> list[Block]:
    """Means by run, which method people score higher beside what the metrics say, and how raters and metrics agree; or how to come by such scores."""
    if not rated:
        return people.asked_for(rows)
    labels = {Path(r["run"]).name: r["label"] for r in rows}
    criteria: dict[str, Row] = rated["criteria"]
    runs = [name for name in labels if any(name in c["runs"] for c in criteria.values())]
    body = [[Cell(labels[name]), *(score(c["runs"], name) for c in criteria.values())] for name in runs]
    means = [Table(["run", *criteria], body)] if body else []
    return [Heading("Human scores", 3), Paragraph(people.who_scored(rated)), *means, *people.preferences(rated, found), *people.agreement(rated)]


def tasks(rows: Sequence[Row]) -> list[Block]:
    """What lm-evaluation-harness measured on the saved models."""
    known = [r for r in rows if r["tasks"]]
    if not known:
        return []
    columns = list(dict.fromkeys((task, m) for r in known for task, found in r["tasks"]["tasks"].items() for m in found))

    def shown(score: Mapping[str, Any] | None) -> Cell:
        if not score or score.get("value") is None:
            return Cell(MISSING)
        return Cell(number(score["value"], 3) + (f" ± {score['stderr']:.3f}" if score.get("stderr") is not None else ""), score["value"])

    body = [[Cell(r["label"]), *(shown(r["tasks"]["tasks"].get(task, {}).get(m)) for task, m in columns)] for r in known]
    limited = sorted({r["tasks"]["limit"] for r in known if r["tasks"].get("limit")})
    text = "lm-evaluation-harness on the saved models, with standard errors" + (f"; only the first {limited[0]:,} rows of each task" if limited else "") + "."
    return [Heading("Outside tasks", 3), Paragraph(text), Table(["run", *(f"{task}, {m}" for task, m in columns)], body, wide=len(columns) > 4)]


def hybrids(rows: Sequence[Row], shown: Sequence[Row], found: Sequence[Verdict]) -> list[Block]:
    """What the hybrid runs gave against their parts, what those cost, and every combination that was tried."""
    said, out = both_ways(found), list[Block]()
    for row in (r for r in rows if r["parts"]):
        methods = [p["method"] for p in row["parts"]]
        out.append(Paragraph(about.parts(row)))
        if row["tried"]:
            body = [[Cell(t["kind"]), *(amount(t["weights"].get(m, 0.0), 2) for m in methods), amount(t["valid_perplexity"], 3)] for t in row["tried"]]
            out.append(Table(["combination", *map(title, methods), "validation perplexity"], body))
    pairs = dict.fromkeys((r["method"], p["method"]) for r in rows if r["parts"] and r["status"] == "done" for p in r["parts"])
    answers = [study.pair(shown, said, a, b) for a, b in pairs if (a, b, SCORES[0]) in said]
    return [Heading("Hybrids", 3), *([Bullets(answers)] if answers else []), *out] if out else []


def samples(results: Results) -> list[Block]:
    """The fixed prompts, then seeded test rows, each with the replies of the base model and of one run of every method."""
    runs = [found[0] for found in by_method(r for r in results.rows if r["status"] == "done").values()]
    fixed: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for s in (run["samples"] or {}).get("samples", []):
            fixed.setdefault(s["prompt"], []).append((run["label"], s["prediction"]))
    out = [Sample(f"Fixed prompt {i}", prompt, None, replies) for i, (prompt, replies) in enumerate(fixed.items(), 1)]
    answered = [(r["label"], results.answers[r["run"]].samples) for r in runs if r["run"] in results.answers]
    for key, row in {k: v for _, found in reversed(answered) for k, v in found.items()}.items():
        replies = [(label, found[key]["prediction"]) for label, found in answered if key in found]
        out.append(Sample(f"Test row {key}", row["prompt"], row["reference"], replies))
    return [Heading("Sample generations"), *([Samples(out)] if out else [Paragraph("No run has replies yet.")])]


def gates(rows: Sequence[Row]) -> list[Block]:
    """Did it train? Every check of every run, and the details of those that failed."""
    known = [r for r in rows if r["gates"]]
    if not known:
        return []
    words = {True: "passed", False: "FAILED", None: "not judged"}
    columns = list(dict.fromkeys(g for r in known for g in r["gates"]))
    body = [[Cell(r["label"]), *(Cell(words[r["gates"][g]["passed"]] if g in r["gates"] else MISSING) for g in columns)] for r in known]
    failed = [f"{r['label']}, {name.replace('_', ' ')}: {g['detail']}" for r in known for name, g in r["gates"].items() if g["passed"] is False]
    table = Table(["run", *(g.replace("_", " ") for g in columns)], body, texts=1 + len(columns), wide=True)
    return [Heading("Did it train?"), table, *([Bullets(failed)] if failed else [])]


def learning_rates(found: Sequence[Row]) -> list[Block]:
    """The learning rates that sweeps tried: one row for each rate of each method."""
    if not found:
        return []
    text = (
        "Short trainings on as many rows as stated, judged by the perplexity of validation rows; test rows were not opened for it. "
        "A rate without a perplexity diverged or changed nothing. The runs that were made with --tuned use the best one."
    )
    body = [
        [Cell(title(sweep["method"])), Cell("yes" if (rate := point["learning_rate"]) == sweep["best"] else ""), Cell(f"{rate:g}", rate),
         amount(point["valid_perplexity"], 3), amount(sweep["budget"]["rows"], 0)]
        for sweep in found for point in sweep["curve"]
    ]  # fmt: skip
    return [Heading("Learning rates tried"), Paragraph(text), Table(["method", "best", "learning rate", "validation perplexity", "rows"], body, texts=2)]

"""What was compared and how to do it again: introduction, approach, data, machine, settings, commands, published figures, limits; as blocks."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.config import BASE, fields, load_recipe, recipes
from kit.console import counts
from kit.errors import UserError
from kit.forgetting import asked
from kit.methods import METHODS
from kit.report.answers import by_method
from kit.report.blocks import Block, Bullets, Cell, Code, Heading, Paragraph, Table
from kit.report.rows import COLUMNS, MISSING, SCORES, Row, duration, number, optional, title
from kit.report.verdicts import uses
from kit.report.words import BUILT_IN, built_in, counted, names, sentence
from kit.settings import resolve
from kit.statistics import METHOD_NOTE

LIMITS = (
    "One model and one draw of data: another model, size or kind of data may rank the methods differently.",
    "BLEU-4, ROUGE-L and perplexity measure likeness to one reference reply, not whether a reply is true, safe or helpful.",
    "Replies are generated greedily, up to a maximum length.",
    "Memory and time are measured once a run, on one machine; they have no intervals and no verdicts.",
)

# What published set-ups measured: the keys of a recipe's `published`.
PUBLISHED = {
    "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "perplexity": "perplexity", "human": "human 0–5", "memory_gb": "memory (GB)", "time_s": "time",
}  # fmt: skip


def values(setting: str, rows: Sequence[Row]) -> list[Any]:
    """The different values that the runs were made with, unset ones left out."""
    found = {repr(v): v for r in rows if (v := (r["config"] or {}).get(setting)) not in (None, "")}
    return [found[k] for k in sorted(found)]


def recipe(rows: Sequence[Row]) -> dict[str, Any]:
    return next((load_recipe(name) for name in values("recipe", rows) if name in recipes()), {})


def introduction(rows: Sequence[Row]) -> list[Block]:
    tuned = list(dict.fromkeys(title(r["method"]) for r in rows if r["method"] != BASE))
    models = names([str(m) for m in values("model", rows)]) or "the model"
    subject = f"This study compares {names(tuned)}" if len(tuned) > 1 else f"This study looks at {tuned[0] if tuned else 'the base model'}"
    text = f"{subject} on {models}: what does each give in the quality of replies, and what does it need in memory and time?"
    about = [Paragraph(_set_up(rows, recipe(rows)))] if recipe(rows) else []
    return [Heading("Introduction"), Paragraph(text), *about, *([Paragraph(BUILT_IN, "note")] if built_in(rows) else [])]


def _set_up(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    """What the recipe says of itself. It describes the whole set-up, so what these runs have of their own comes first."""
    whole = "The set-up itself, as published" if found.get("published") else "The recipe itself"
    if any(values(trial, rows) not in ([], [False]) for trial in ("scale_down", "limit_train", "limit_test")):
        used = [f"{n} {what} rows" for what, split in (("training", "train"), ("test", "test")) if (n := _used(rows, split))]
        model = "the built-in model" if built_in(rows) else names([str(m) for m in values("model", rows)])
        computed = dict.fromkeys(p["name"] for r in rows if (p := r["precision"]))
        how = f", computed in {names([*computed])}" if computed else ""
        return f"These runs are a trial of recipe {values('recipe', rows)[0]}, on {model} with {names(used)}{how}. {whole}: {found['about']}"
    if any(_changes(r).keys() - {"forgetting_text", "score_tokens"} for r in rows if r["config"]):
        return f"These runs change the recipe by the flags under How to reproduce. {whole}: {found['about']}"
    return f"Recipe: {found['about']}"


def _used(rows: Sequence[Row], split: str) -> str:
    """How many rows of a split the runs used; the base model is trained on none."""
    known = [c for r in rows if (c := r["config"]) and not (split == "train" and r["method"] == BASE)]
    totals = [(c.get(f"{split}_per_source") or 0) * len(c.get("source") or []) for c in known]
    return " or ".join(f"{n:,}" for n in sorted({min(total, c.get(f"limit_{split}") or total) for c, total in zip(known, totals, strict=True)}))


def approach(rows: Sequence[Row], unfair: int, n: int | None) -> list[Block]:
    """The methods, and how they were compared; `unfair` pairs differ in more than the method."""
    same = (
        "The compared runs share rows, settings, hardware and library versions but for what makes a method." if not unfair
        else f"Of the pairs of methods, {counted(unfair, 'differs', 'differ')} in more than the method: listed under Fairness, and not ranked."
    )  # fmt: skip
    scored = f" Verdicts are over {n:,} test rows." if n else ""
    how = f"{same} The loss is taken on the assistant's tokens and each turn's terminator, and on nothing else.{scored} {METHOD_NOTE}"
    known = [f"{METHODS[m].title}: {METHODS[m].about}{_here(runs[0])}" for m, runs in by_method(rows).items() if m in METHODS]
    return [Heading("Approach"), Paragraph(how), *([Bullets(known)] if known else [])]


def _here(row: Row) -> str:
    """The method's own settings as its run had them."""
    config, method = row["config"], METHODS[row["method"]]
    if not config or method.parts == ("qlora", "highrank"):
        return ""
    adapter, projected = ("rank", "alpha"), ("rank", "update_gap", "projection_scale")
    own = projected if method.projection else () if method.full else adapter
    numbers = [key for key, value in method.settings.items() if type(value) in (int, float)]
    keys = dict.fromkeys((*own, "learning_rate", *numbers))
    said = [f"{key.replace('_', ' ')} {_value(config[key])}" for key in keys if config.get(key) is not None]
    return f" Here: {', '.join(said)}." if said else ""


def data(manifest: Mapping[str, Any] | None, rows: Sequence[Row]) -> list[Block]:
    """Where the rows come from, what was dropped and cut, and what the audit for duplicates and leaks found."""
    if not manifest:
        return []
    keys = ("rows_in", "kept", "train", "test")
    where = {n: s["origin"] + (f":{part}" if (part := s.get("part")) else "") for n, s in manifest["sources"].items()}
    body = [[Cell(n), Cell(where[n] + (f" @ {s['revision'][:12]}" if s["revision"] else "")), Cell(counts(s["dropped"])),
             *(Cell(f"{s[k]:,}", s[k]) for k in keys)] for n, s in manifest["sources"].items()]  # fmt: skip
    limits = [f"the first {n:,} {split} rows" for split in ("train", "test") for n in values(f"limit_{split}", rows)]
    notes = [f"These runs used only {' and '.join(limits)}."] if limits else []
    if unused := sorted({n for r in rows if (n := r["rows_left_out"])}):
        none = "fills none and is" if unused == [1] else "fill none and are"
        notes.append(f"Training takes whole effective batches: of the training rows {' or '.join(map(str, unused))} {none} left out of an epoch.")
    limited: list[Block] = [Paragraph(" ".join(notes), "note")] if notes else []
    found, leaks = manifest["duplicates"], manifest["leaks"]
    cut = " ".join(f"{split}: {counts(c)}." for split, c in manifest["truncated"].items())
    audit = (
        f"{counted(found['exact'], 'exact duplicate was', 'exact duplicates were')} dropped. "
        f"{found['near']:,} rows in {counted(found['groups'], 'group', 'groups')} of near duplicates (word 3-gram "
        f"similarity of {found['similarity']} or more, or the same prompt) were kept on one side of the split each. Of all test rows "
        f"{counted(leaks['same_prompt']['test_rows'], 'shares its', 'share their')} whole prompt and "
        f"{counted(leaks['same_opening']['test_rows'], 'its', 'their')} first question with a training row."
    )
    table = Table(["source", "origin", "dropped", "rows in", "kept", "train", "test"], body, texts=3)
    return [Heading("Data"), table, *limited, Paragraph(audit), Paragraph(f"At {manifest['inputs']['max_length']} tokens a row, {cut}")]


def published(rows: Sequence[Row]) -> list[Block]:
    """The figures of the set-up that the recipe follows, as printed there and set apart: their protocols are not stated, so they compare with nothing here."""
    found = recipe(rows)
    if not found.get("published"):
        return []

    # A study that measured something without saying what came of it has the key and no figure.
    columns = [key for key in PUBLISHED if any(key in p for p in found["published"])]
    body = [[Cell(METHODS[p["method"]].title), *(_printed(key, p.get(key)) for key in columns)] for p in found["published"]]
    unstated = f"Not comparable with the figures of this report: scales and protocols differ. Left unstated there: {', '.join(found['unstated'])}."
    heading = Heading("Published figures of this set-up")
    return [heading, Paragraph(unstated, "note"), Table(["method", *(PUBLISHED[key] for key in columns)], body)]


def _printed(key: str, figures: Any) -> Cell:
    """One figure, or those before and after tuning."""
    known: list[float | None] = figures if isinstance(figures, list) else [figures]
    if all(v is None for v in known):
        return Cell("not stated")
    return Cell(" → ".join(duration(v) if key == "time_s" else MISSING if v is None else f"{v:g}" for v in known), known[-1])


def machine(rows: Sequence[Row]) -> list[Block]:
    """Hardware, precision and versions of all runs; where they differ, all values."""
    known = [r["provenance"] for r in rows if r["provenance"]]
    if not known:
        return []

    def all_of(found: Sequence[Any]) -> str:
        return "; ".join(dict.fromkeys(str(v) for v in found if v)) or MISSING

    gpu = [p.get("gpu") or f"none ({p.get('gpu_absent_because')})" for p in known]
    precision = [f"{p['name']} ({p['reason']})" for r in rows if (p := r["precision"])]
    packages = dict.fromkeys(k for p in known for k in p.get("versions", {}))
    body = [("GPU", all_of(gpu)), ("CPU", all_of([p.get("cpu") for p in known])), ("driver", all_of([p.get("driver") for p in known]))]
    body += [("precision", all_of(precision)), *((k, all_of([p.get("versions", {}).get(k) for p in known])) for k in packages)]
    return [Heading("Hardware and versions"), Table(["", "value"], [[Cell(a), Cell(b)] for a, b in body], texts=2)]


def settings(rows: Sequence[Row]) -> list[Block]:
    """Every setting: those that differ by method, then those that all share; each of the methods alone that use it."""
    known = {m: runs[0]["config"] for m, runs in by_method(r for r in rows if r["config"] and r["method"] != BASE).items()}
    if not known:
        return []
    keys = [k for k in dict.fromkeys(k for c in known.values() for k in c) if k not in ("method", "seed")]
    used = {k: {m: _value(c.get(k)) for m, c in known.items() if uses(m, k)} for k in keys}
    differing = [k for k in keys if len({*used[k].values()}) > 1]
    body = [[Cell(k), *(Cell(used[k].get(m, MISSING)) for m in known)] for k in differing]
    table: list[Block] = [Table(["setting", *map(title, known)], body, texts=1, wide=True)] if body else []
    shared = [f"{k} {next(iter(used[k].values()))}" for k in keys if k not in differing and used[k]]
    common = textwrap.fill("; ".join(shared), 88, break_on_hyphens=False, break_long_words=False)
    intro = Paragraph("What differs between the methods:" if body else "The methods differ in no setting.")
    return [Heading("Settings"), intro, *table, Paragraph("The same for all, or for those that use it:"), Code(common)]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or MISSING
    return MISSING if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def reproduce(rows: Sequence[Row], manifest: Mapping[str, Any] | None) -> list[Block]:
    """The commands that give these runs again, the code's revision and the data's hashes."""
    known = [r["provenance"] for r in rows if r["provenance"]]
    revisions = {(p["git"], p.get("git_dirty")) for p in known if p.get("git")}
    lines = [f"git checkout {sha}" + ("   # with changes that were not committed" if dirty else "") for sha, dirty in sorted(revisions, key=str)]
    grouped: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for row in rows:
        if row["config"] and row["method"] in METHODS:
            grouped.setdefault(_command(row), {}).setdefault(row["method"], []).append(row["seed"] or 0)
    for (variables, extra), methods in grouped.items():
        for seeds in dict.fromkeys(tuple(s) for s in methods.values()):
            those = " ".join(m for m, s in methods.items() if tuple(s) == seeds)
            several = f' SEEDS="{" ".join(map(str, seeds))}"' if seeds != (0,) else ""
            lines.append(f'make compare {variables} METHODS="{those}"{several}' + (f" ARGS={shlex.quote(extra)}" if extra else ""))
    hashes = [f"data manifest: {h}" for h in sorted({p["data"] for p in known if p.get("data")})]
    hashes += [f"{name}: {f['sha256']}" for name, f in (manifest or {}).get("files", {}).items()]
    hashes += [f"model revision: {h}" for h in sorted({p["model_revision"] for p in known if p.get("model_revision")})]
    made_from: list[Block] = [Paragraph("SHA-256 of what the runs were made from:"), Code("\n".join(hashes))] if hashes else []
    return [Heading("How to reproduce"), Code("\n".join(lines)), *made_from]


def _command(row: Row) -> tuple[str, str]:
    """(Make's variables, other flags) that give a run's settings back."""
    config = row["config"]
    variables = f"RECIPE={config['recipe']}" + (f" NAME={config['name']}" if config["name"] != config["recipe"] else "")
    flags = ["--scale-down"] if config.get("scale_down") else []
    for key, value in _changes(row).items():
        option, field = f"--{key.replace('_', '-')}", fields()[key]
        if field.kind is bool:
            flags.append(option if value else option.replace("--", "--no-", 1))
        else:
            flags += [part for v in (value if field.repeat else [value]) for part in (option, str(v))]
    return variables, shlex.join(flags)


def _changes(row: Row) -> dict[str, Any]:
    """The settings in which a run differs from what its recipe gives its method."""
    config, text = row["config"], (row["forgetting"] or {}).get("text")
    try:
        usual = resolve({"recipe": config["recipe"], "name": config["name"], "method": config["method"], "scale_down": config.get("scale_down", False)})
        standard = usual.identity() | {k: getattr(usual, k) for k in ("forgetting_text", "score_tokens")}
    except UserError:  # a recipe that is no longer there
        standard = {}
    config = config | ({"forgetting_text": asked(text)} if text else {}) | ({"score_tokens": tokens} if (tokens := row["score_tokens"]) else {})
    named = ("recipe", "name", "method", "seed", "scale_down")
    # Without a rate --tuned would ask for the sweep's file; what is built on others takes the rates of its parts.
    told = ("learning_rate",) if config.get("tuned") and not METHODS[config["method"]].parts else ()
    return {k: v for k in fields() if k not in named and k in config and (v := config[k]) is not None and (v != standard.get(k) or k in told)}


def limits(rows: Sequence[Row]) -> list[Block]:
    untuned = [] if values("tuned", rows) == [True] else ["Not every learning rate was tuned; a method may do better with one that is (make sweep)."]
    signatures = dict.fromkeys(f"{COLUMNS[m].title}: {r[m]['signature']}" for m in SCORES for r in rows if r[m] and "signature" in r[m])
    how: list[Block] = [Heading("How the scores are computed", 3), Bullets([*signatures])] if signatures else []
    return [Heading("Limits"), Bullets([*LIMITS, *untuned]), *how]


def parts(row: Row) -> str:
    """What a hybrid run is built on."""
    built = [f"{title(p['method'])} (rank {p['rank']}, {p['steps']} steps, {duration(p['train_wall_s'])}, validation perplexity "
             f"{number(p['valid_perplexity'], 3)})" for p in row["parts"]]  # fmt: skip
    combinations = [t for t in row["tried"] or [] if t["kind"] != "alone" and t["valid_perplexity"] is not None]
    best = min(combinations, key=lambda t: t["valid_perplexity"], default=None)
    weights = f"{best['kind']}, {names([f'{w:g} {title(m)}' for m, w in best['weights'].items()])}" if best else ""
    chosen = f" Chosen of the combinations on validation rows: {weights}. The parts alone, on the 16-bit base model, stand beside." if best else ""
    theirs = "theirs" if len(built) > 1 else f"{title(row['parts'][0]['method'])}'s"
    return sentence(f"{row['label']} is built on {names(built)}; its time, tokens and other costs include {theirs}.{chosen}")


def read_optional(path: Path, shape: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """A JSON file that may be missing or damaged, and a note in the second case."""
    try:
        return optional(path, shape) or None, []
    except UserError as error:
        return None, [str(error)]

"""Sources -> data/NAME/{train,test}.jsonl and manifest.json, every row accounted for.

Rows are drawn by the hash of their content, so the draw depends on the seed and the text and on nothing else; the test split takes
the lowest hashes and the train split the highest, so that growing one leaves the other as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.config import DATA_FIELDS, RunConfig
from kit.console import counts, say
from kit.errors import UserError
from kit.files import read_json, read_jsonl, replaced_folder, sha256, write_json, write_jsonl
from kit.prompts import Renderer
from kit.sources import Reading, fingerprint, parse, read

SCHEMA = 1
SPLITS = ("train", "test")
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
Row = dict[str, Any]


def inputs(config: RunConfig) -> dict[str, Any]:
    """What decides the content of the data folder, JSON-ready."""
    values = {k: v for k, v in config.identity().items() if k in DATA_FIELDS}
    return values | {"source": sorted(fingerprint(s) for s in config.source)}


def manifest_of(config: RunConfig) -> dict[str, Any] | None:
    """The manifest of the built data, or None. Data built from other inputs is a UserError that names what differs."""
    path = config.data_path / "manifest.json"
    if not path.exists():
        return None
    manifest: dict[str, Any] = read_json(path)
    differing = [k for k, v in inputs(config).items() if manifest["inputs"].get(k) != v]
    if differing:
        raise UserError(
            f"{config.data_path} was built from other inputs ({', '.join(differing)}); choose another --name, or rebuild it with scripts/data.py --overwrite"
        )
    return manifest


def prepare(config: RunConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """The manifest of the data for a configuration; builds the folder when it is missing, and says so."""
    if not config.source:
        raise UserError("no data: give at least one --source NAME=ORIGIN")
    if not overwrite and (manifest := manifest_of(config)):
        return manifest
    say(f"building {config.data_path} from {', '.join(config.source)}")
    readings = {parse(spec)[0]: read(spec) for spec in config.source}
    if len(readings) < len(config.source):
        raise UserError("a source is named twice; each --source needs a name of its own")
    splits: dict[str, dict[str, list[Row]]] = {split: {} for split in SPLITS}
    for name, reading in sorted(readings.items()):
        rows = distinct(name, reading, config.data_seed)
        if not rows:
            raise UserError(f"source {name}: no usable rows in {reading.origin} (dropped: {counts(reading.dropped)})")
        wanted = config.train_per_source + config.test_per_source
        if wanted > len(rows):
            raise UserError(
                f"source {name}: {len(rows)} usable rows in {reading.origin}, fewer than {config.train_per_source} train "
                f"+ {config.test_per_source} test; lower --train-per-source or --test-per-source"
            )
        splits["test"][name] = rows[: config.test_per_source]
        splits["train"][name] = rows[::-1][: config.train_per_source]
    return _write(config, readings, {split: interleaved(by_name) for split, by_name in splits.items()})


def distinct(name: str, reading: Reading, seed: int) -> list[Row]:
    """The source's rows without exact duplicates, sorted by the hash of seed and content; duplicates are counted as dropped."""
    rows: dict[str, Row] = {}
    for row in reading.rows:
        content = json.dumps([seed, row["messages"]], ensure_ascii=False)
        rows.setdefault(hashlib.sha256(content.encode()).hexdigest(), row)
    reading.dropped["duplicate"] += len(reading.rows) - len(rows)
    reading.dropped += Counter()  # leaves out reasons that count 0
    return [{"id": f"{name}-{digest[:16]}", "source": name, **rows[digest]} for digest in sorted(rows)]


def interleaved(by_name: dict[str, list[Row]]) -> list[Row]:
    """One row of each source in turn, so that every beginning of the file is balanced."""
    return [row for rank in zip(*by_name.values(), strict=True) for row in rank]


def _write(config: RunConfig, readings: dict[str, Reading], splits: dict[str, list[Row]]) -> dict[str, Any]:
    from kit.hub import load_tokenizer

    renderer = Renderer(load_tokenizer(config.model, config.revision), config.format, config.max_length)
    fitted = {"train": [(e.fit, len(e.input_ids)) for e in renderer.examples(splits["train"])],
              "test": [(e.fit, len(e.prompt_ids) + len(e.reference_ids)) for e in renderer.exams(splits["test"])]}  # fmt: skip
    manifest: dict[str, Any] = {"schema": SCHEMA, "inputs": inputs(config), "seed": config.data_seed, "format": config.format}
    manifest["sources"] = {
        name: {"origin": r.origin, "revision": r.revision, "rows_in": r.rows_in, "kept": r.rows_in - r.dropped.total(),
               "dropped": dict(sorted(r.dropped.items())), "repaired": dict(sorted(r.repaired.items()))}
        | {split: sum(row["source"] == name for row in rows) for split, rows in splits.items()}
        for name, r in sorted(readings.items())
    }  # fmt: skip
    manifest["truncated"] = {split: dict(sorted(Counter(fit for fit, _ in pairs).items())) for split, pairs in fitted.items()}
    manifest["lengths"] = {split: percentiles([n for _, n in pairs]) for split, pairs in fitted.items()}
    with replaced_folder(config.data_path) as folder:
        for split, rows in splits.items():
            write_jsonl(folder / f"{split}.jsonl", rows)
        manifest["files"] = {f"{s}.jsonl": {"rows": len(rows), "sha256": sha256(folder / f"{s}.jsonl")} for s, rows in splits.items()}
        write_json(folder / "manifest.json", manifest)
    return manifest


def percentiles(lengths: list[int]) -> dict[str, int]:
    """Nearest-rank percentiles of token counts, after fitting to the maximum length."""
    ordered = sorted(lengths)
    return {f"p{p}": ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES}


def rows(config: RunConfig, split: str) -> list[Row]:
    """The split's rows up to the limit, checked against the manifest's hash."""
    manifest = prepare(config)
    path = config.data_path / f"{split}.jsonl"
    if not path.exists() or sha256(path) != manifest["files"][path.name]["sha256"]:
        raise UserError(f"{path} is missing or was changed since it was built; rebuild it with scripts/data.py --overwrite")
    limit = config.limit_train if split == "train" else config.limit_test
    return list(_head(read_jsonl(path), limit))


def _head(stream: Iterator[Row], limit: int | None) -> Iterator[Row]:
    for number, row in enumerate(stream):
        if limit is not None and number >= limit:
            return
        yield row


def manifest_hash(config: RunConfig) -> str:
    """Identifies the built data in results."""
    return sha256(Path(config.data_path) / "manifest.json")

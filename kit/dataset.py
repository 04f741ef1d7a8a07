"""Sources -> data/NAME/{train,valid,test}.jsonl and manifest.json, every row accounted for.

Two passes keep memory flat: the first counts, hashes and sketches every row and keeps none; the second reads the rows drawn.
The draw is by the hash of content: test takes the lowest hashes and train the highest, so that growing one leaves the rows of the
other; valid is drawn by another hash, before train. Rows alike (`kit.audit`) share a hash, whatever their number, and so a split; test
and valid take one row of each such group from a source, since intervals and tests count rows as independent.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from kit.config import DATA_FIELDS, RunConfig
from kit.console import counts, say
from kit.errors import UserError
from kit.files import held, read_json, read_jsonl, replaced_folder, sha256, write_json, write_jsonl
from kit.sources import Stream

SCHEMA = 3
# Half a million rows take minutes.
SAID_EVERY = 50_000
SPLITS = ("train", "valid", "test")
Row = dict[str, Any]


def inputs(config: RunConfig) -> dict[str, Any]:
    """What decides the content of the data folder, JSON-ready."""
    values = {k: v for k, v in config.identity().items() if k in DATA_FIELDS}
    return values | {"source": sorted(Stream(s).fingerprint() for s in config.source), "schema": SCHEMA}


def manifest_of(config: RunConfig) -> dict[str, Any] | None:
    """The manifest of the built data, or None. Data built from other inputs is a UserError that names what differs."""
    path = config.data_path / "manifest.json"
    if not path.exists():
        return None
    manifest: dict[str, Any] = read_json(path, "inputs", "files", "sources")
    differing = [k for k, v in inputs(config).items() if manifest["inputs"].get(k) != v]
    if differing:
        raise UserError(
            f"{config.data_path} was built from other inputs ({', '.join(differing)}); give the flags that it was built with (its manifest.json has them), "
            "choose another --name, or rebuild it with scripts/data.py --overwrite"
        )
    return manifest


def prepare(config: RunConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """The manifest of the data for a configuration; builds the folder when it is missing, and says so."""
    if not config.source:
        raise UserError("no data: give at least one --source NAME=ORIGIN")
    if not overwrite and (manifest := manifest_of(config)):
        return manifest
    streams = [Stream(spec) for spec in config.source]
    if len({s.name for s in streams}) < len(streams):
        raise UserError("a source is named twice; each --source needs a name of its own")
    with held(Path(config.data_dir), wait=True):
        # Another process may have built it meanwhile.
        return (None if overwrite else manifest_of(config)) or _build(config, streams)


def _build(config: RunConfig, streams: list[Stream]) -> dict[str, Any]:
    say(f"building {config.data_path} from {', '.join(config.source)}")
    pools = [Pool(stream, config.data_seed) for stream in streams]
    duplicates = group(pools)
    drawn = draw(pools, config)
    pools.clear()  # before the tokeniser's libraries take their share of memory
    splits = {split: interleaved([drawn[s.name][split] for s in streams]) for split in SPLITS}
    return _write(config, streams, splits, duplicates)


@dataclass
class Pool:
    """The first pass over a source: a hash, a row number and a sketch for each distinct row, and none of the rows."""

    stream: Stream
    seed: int
    hashes: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    prompts: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    signatures: Any = None

    def __post_init__(self) -> None:
        from kit.audit import Sketches, prompt_hash

        seen: set[bytes] = set()
        sketches = Sketches()
        for number, row in self.stream.rows():
            content = json.dumps([self.seed, row["messages"]], ensure_ascii=False)
            digest = hashlib.sha256(content.encode()).digest()[:16]
            if digest in seen:
                self.stream.dropped["duplicate"] += 1
                continue
            seen.add(digest)
            self.hashes.append(digest)
            self.numbers.append(number)
            self.prompts.append(prompt_hash(row))
            sketches.add(row)
            if len(self.hashes) % SAID_EVERY == 0:
                say(f"source {self.stream.name}: {len(self.hashes):,} rows read")
        self.signatures = sketches.matrix()
        if self.stream.told_by:
            say(f"source {self.stream.name}: read as {self.stream.shape}, from {self.stream.told_by}")
        if not self.hashes:
            raise UserError(f"source {self.stream.name}: no usable rows in {self.stream.origin} (dropped: {counts(self.stream.dropped)})")


def group(pools: list[Pool]) -> dict[str, Any]:
    """Gives every row the key of its group of near duplicates, across sources; returns what was found."""
    import numpy as np

    from kit.audit import SIMILAR, groups

    signatures = pools[0].signatures if len(pools) == 1 else np.concatenate([pool.signatures for pool in pools])
    for pool in pools:
        pool.signatures = None
    found = groups(signatures, [p for pool in pools for p in pool.prompts])
    del signatures
    sizes = np.bincount(found, minlength=len(found))
    hashes, numbers = [digest for pool in pools for digest in pool.hashes], found.tolist()
    lowest: dict[int, bytes] = {}
    for i in np.flatnonzero(sizes[found] > 1).tolist():
        lowest[numbers[i]] = min(hashes[i], lowest.get(numbers[i], hashes[i]))
    # Hashed again: the lowest of many hashes is low, and test would draw large groups more often than they are.
    shared = {g: hashlib.sha256(low).digest()[:16] for g, low in lowest.items()}
    keys = iter([shared.get(g, digest) for g, digest in zip(numbers, hashes, strict=True)])
    for pool in pools:
        pool.keys = list(islice(keys, len(pool.hashes)))
    large = sizes[sizes > 1]
    exact = sum(pool.stream.dropped["duplicate"] for pool in pools)
    return {"exact": exact, "near": int(large.sum()), "groups": len(large), "largest_group": int(large.max(initial=1)), "similarity": SIMILAR}


def draw(pools: list[Pool], config: RunConfig) -> dict[str, dict[str, list[Row]]]:
    """The rows of each source and split. A group that test or valid touches, in any source, is kept out of the splits after it."""
    wanted = {"test": config.test_per_source, "valid": config.valid_per_source, "train": config.train_per_source}
    chosen: dict[str, dict[str, list[int]]] = {p.stream.name: {} for p in pools}
    taken: set[bytes] = set()
    for split, n in wanted.items():
        used: set[bytes] = set()
        for pool in pools:
            chosen[pool.stream.name][split] = picks = _pick(pool, split, n, taken)
            if len(picks) < n:
                raise UserError(_too_few(pool, pools, config))
            used |= {pool.keys[i] for i in picks}
        taken |= used
    return {pool.stream.name: _fetch(pool, chosen[pool.stream.name]) for pool in pools}


def _pick(pool: Pool, split: str, n: int, taken: set[bytes]) -> list[int]:
    """The first n rows in the split's order whose groups are free: test from the lowest hash, train from the highest, valid by another hash.

    Test and valid take one row of a group.
    """

    def order(i: int) -> tuple[bytes, bytes]:
        key = hashlib.sha256(b"valid" + pool.keys[i]).digest() if split == "valid" else pool.keys[i]
        return key, pool.hashes[i]

    ordered = sorted(range(len(pool.keys)), key=order, reverse=split == "train") if n else []
    free = (i for i in ordered if pool.keys[i] not in taken)
    if split != "train":
        free = (next(rows) for _, rows in groupby(free, key=pool.keys.__getitem__))
    return list(islice(free, n))


def _too_few(pool: Pool, pools: list[Pool], config: RunConfig) -> str:
    wanted = {"train": config.train_per_source, "valid": config.valid_per_source, "test": config.test_per_source}
    sizes = Counter(pool.keys)
    # In the same proportion, of the groups that no other source can take.
    free = len(sizes.keys() - {key for other in pools if other is not pool for key in other.keys})
    fitting = {split: int(0.95 * free * n / sum(wanted.values())) for split, n in wanted.items() if n}
    flags = " ".join(f"--{split}-per-source {n}" for split, n in fitting.items())
    about = [f"{len(sizes)} that differ", f"{max(sizes.values())} are near duplicates of each other"] if len(sizes) < len(pool.keys) else []
    about += [f"dropped: {counts(pool.stream.dropped)}"] if pool.stream.dropped else []
    told = f" ({'; '.join(about)})" if about else ""
    return (
        f"source {pool.stream.name}: {len(pool.keys)} usable rows in {pool.stream.origin}{told} are too few for "
        f"{' + '.join(f'{n} {split}' for split, n in wanted.items() if n)} with near duplicates kept on one side; "
        + (f'take fewer, such as {flags} (with make: ARGS="{flags}")' if all(fitting.values()) else "it takes more rows")
    )


def _fetch(pool: Pool, chosen: dict[str, list[int]]) -> dict[str, list[Row]]:
    """The second pass: the drawn rows in the order drawn."""
    place = {pool.numbers[i]: (split, rank, i) for split, picks in chosen.items() for rank, i in enumerate(picks)}
    out: dict[str, list[Row]] = {split: [{}] * len(picks) for split, picks in chosen.items()}
    for number, row in pool.stream.rows(wanted=place):
        split, rank, i = place[number]
        out[split][rank] = {"id": f"{pool.stream.name}-{pool.hashes[i].hex()[:16]}", "source": pool.stream.name, **row}
    return out


def interleaved(by_source: list[list[Row]]) -> list[Row]:
    """One row of each source in turn, so that every beginning of the file is balanced."""
    return [row for rank in zip(*by_source, strict=True) for row in rank]


def _write(config: RunConfig, streams: list[Stream], splits: dict[str, list[Row]], duplicates: dict[str, Any]) -> dict[str, Any]:
    from kit.audit import leaks

    splits = {split: rows for split, rows in splits.items() if rows}
    stats = measure(config, splits)
    manifest: dict[str, Any] = {"schema": SCHEMA, "inputs": inputs(config), "seed": config.data_seed, "format": config.format}
    manifest["sources"] = {
        s.name: {"origin": s.origin, "part": ":".join(s.part) if s.revision else None, "revision": s.revision, "shape": s.shape,
                 "rows_in": s.rows_in, "kept": s.rows_in - s.dropped.total(), "dropped": dict(sorted(s.dropped.items())),
                 "repaired": dict(sorted(s.repaired.items()))}
        | {split: sum(row["source"] == s.name for row in rows) for split, rows in splits.items()}
        for s in streams
    }  # fmt: skip
    manifest["duplicates"] = duplicates
    manifest["leaks"] = leaks(splits)
    manifest["truncated"] = {split: s["fit"] for split, s in stats.items()}
    manifest["lengths"] = {split: s["tokens"] for split, s in stats.items()}
    with replaced_folder(config.data_path) as folder:
        for split, rows in splits.items():
            write_jsonl(folder / f"{split}.jsonl", rows)
        write_json(folder / "dataset_stats.json", {"schema": SCHEMA, "max_length": config.max_length, "splits": stats})
        manifest["files"] = {p.name: {"rows": len(splits.get(p.stem, [])) or None, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
        write_json(folder / "manifest.json", manifest)
    return manifest


def measure(config: RunConfig, splits: dict[str, list[Row]]) -> dict[str, Any]:
    """Statistics of every split at the configuration's tokenizer, format and maximum length."""
    from kit.audit import statistics
    from kit.hub import load_tokenizer
    from kit.prompts import Renderer

    renderer = Renderer(load_tokenizer(config.model, config.revision), config.format, config.max_length)
    out = {}
    for split, rows in splits.items():
        if split == "train":
            made = [(len(e.input_ids), e.supervised, e.fit) for e in renderer.examples(rows)]
        else:
            made = [(len(e.prompt_ids) + len(e.reference_ids), len(e.reference_ids), e.fit) for e in renderer.exams(rows)]
        tokens, supervised, fits = zip(*made, strict=True)
        out[split] = statistics(rows, tokens, supervised, fits)
    return out


def rows(config: RunConfig, split: str) -> list[Row]:
    """The split's rows up to its limit (valid has none), checked against the manifest's hash."""
    manifest = prepare(config)
    path = config.data_path / f"{split}.jsonl"
    if not path.exists() or sha256(path) != manifest["files"][path.name]["sha256"]:
        raise UserError(f"{path} is missing or was changed since it was built; rebuild it with scripts/data.py --overwrite")
    limit = {"train": config.limit_train, "test": config.limit_test}.get(split)
    return list(islice(read_jsonl(path), limit))


def manifest_hash(config: RunConfig) -> str:
    """Identifies the built data in results."""
    return sha256(Path(config.data_path) / "manifest.json")

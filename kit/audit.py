"""Duplicates and leaks: rows whose word 3-grams overlap are grouped before the split, so that no group straddles train and test."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.conversations import INPUT

# 96 permutations estimate a Jaccard similarity s with a standard error of sqrt(s (1 - s) / 96): 0.04 at 0.8.
PERMUTATIONS, BANDS, SEED = 96, 16, 42
SIMILAR = 0.8
WORDS = 3
# Words of one row beyond these are not compared: a row of a megabyte costs no more than a long one.
LONGEST = 20_000
BATCH, AT_ONCE = 2000, 500_000
# What more than this share of a source's first rows have (a system prompt, one instruction for all) makes no two rows alike.
COMMON = 0.2
# Scripts that put no spaces between words (Thai, Lao, Burmese, Khmer, kana, Han): each character counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
Signatures = npt.NDArray[np.uint32]


def _texts(row: dict[str, Any]) -> list[str]:
    """The turns as their source has them: without the label that the kit puts before a separate input."""
    first, *others = [m["content"] for m in row["messages"]]
    extra = row.get("input")
    return [f"{first.removesuffix(f'{INPUT}{extra}')}\n\n{extra}" if extra else first, *others]


def shingles(row: dict[str, Any]) -> list[str]:
    """The word 3-grams of a conversation, in lower case; a shorter text is one shingle."""
    text = " ".join(_texts(row)).lower()
    words = text.split(maxsplit=LONGEST)[:LONGEST] if text.isascii() else [m[0] for m in islice(WORD.finditer(text), LONGEST)]
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


class Sketches:
    """MinHash signatures (Broder 1997) of one source, collected row by row: uint32 [rows, PERMUTATIONS].

    Shingles that are COMMON in the first BATCH rows are left out of a row that has others.
    """

    def __init__(self) -> None:
        self.done: list[Signatures] = []
        self.waiting: list[list[str]] = []
        self.held = 0
        self.common: set[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.waiting.append(shingles(row))
        self.held += len(self.waiting[-1])
        if len(self.waiting) == BATCH or self.held >= AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        from rensa import RMinHash

        if self.common is None:
            seen = Counter(s for row in self.waiting for s in set(row))
            self.common = {s for s, n in seen.items() if n > max(COMMON * len(self.waiting), 10)}
        if self.common:
            self.waiting = [[s for s in row if s not in self.common] or row for row in self.waiting]
        made = RMinHash.digests_from_token_sets(self.waiting, num_perm=PERMUTATIONS, seed=SEED)
        self.done.append(np.asarray(made, dtype=np.uint32).reshape(len(self.waiting), PERMUTATIONS))
        self.waiting, self.held = [], 0

    def matrix(self) -> Signatures:
        if self.waiting:
            self._flush()
        # Filled from the end while the blocks are let go, so that a million rows are never held twice.
        end = sum(map(len, self.done))
        out = np.empty((end, PERMUTATIONS), np.uint32)
        while self.done:
            block = self.done.pop()
            out[end - len(block) : end] = block
            end -= len(block)
        return out


def prompt_hash(row: dict[str, Any]) -> bytes:
    """Identifies everything before the last reply, whatever its case and spaces."""
    text = "\0".join(" ".join(t.split()) for t in _texts(row)[:-1]).lower()
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _pairs(keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[2, n]: row numbers with the same key: each with its bucket's first row and with its neighbour."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    first = order[np.repeat(starts, np.diff(np.append(starts, len(order))))]
    later = order[1:][same]
    return np.stack([np.concatenate([order[:-1][same], first[1:][same]]), np.concatenate([later, later])])


def groups(signatures: Signatures, prompts: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """The group of each row: rows joined by a chain of like pairs share the lowest row's number.

    A pair is alike when its prompts are the same, or when its estimated similarity is >= SIMILAR. Candidates for the latter agree
    in all permutations of one band (locality-sensitive hashing); the estimate over all permutations decides.
    """
    parent = np.arange(len(signatures))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    def join(pairs: npt.NDArray[np.int64]) -> None:
        for i, j in pairs.T.tolist():
            low, high = sorted((root(i), root(j)))
            parent[high] = low

    join(_pairs(np.array(prompts, dtype=np.dtype((np.void, 16)))))
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        pairs = _pairs(np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]).view(np.dtype((np.void, 4 * width))).ravel())
        alike = (signatures[pairs[0]] == signatures[pairs[1]]).mean(axis=1) >= SIMILAR
        join(pairs[:, alike])
    return np.array([root(i) for i in range(len(parent))], dtype=np.int64)


def leaks(splits: dict[str, list[dict[str, Any]]], examples: int = 3) -> dict[str, Any]:
    """What remains between test and training: test rows whose prompt, or whose first question, is there too (with other turns).

    `train_rows` counts from 0 the first training row that has it, since a run may train on the first rows alone. Validation rows, on which choices are
    made and nothing is trained, are not looked at.
    """
    found: dict[str, Any] = {}
    keys: dict[str, Callable[[dict[str, Any]], Any]] = {"same_prompt": prompt_hash, "same_opening": lambda row: row["messages"][0]["content"].lower()}
    for name, key in keys.items():
        seen: dict[Any, int] = {}
        for i, row in enumerate(splits["train"]):
            seen.setdefault(key(row), i)
        pairs = [(row["id"], seen[k]) for row in splits["test"] if (k := key(row)) in seen]
        found[name] = {"test_rows": len(pairs), "test_ids": [test for test, _ in pairs], "train_rows": [i for _, i in pairs],
                       "examples": [[test, splits["train"][i]["id"]] for test, i in pairs[:examples]]}  # fmt: skip
    return found


@cache
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]


def script(text: str) -> str:
    """The writing system of most letters in a text's beginning, as Unicode names it: LATIN, CYRILLIC, CJK, ..."""
    scripts: Counter[str] = Counter()
    for character, n in Counter(text[:500]).items():
        if character.isalpha():
            scripts[_script(character)] += n
    return scripts.most_common(1)[0][0] if scripts else "none"


def statistics(rows: Sequence[dict[str, Any]], tokens: Sequence[int], supervised: Sequence[int], fits: Iterable[str]) -> dict[str, Any]:
    """Lengths in tokens, turns, scripts and truncation of one split, for all rows and by source."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for row, n in zip(rows, tokens, strict=True):
        by_source[row["source"]].append(n)
    return {
        "rows": len(rows), "tokens": percentiles(tokens), "supervised_tokens": percentiles(supervised), "fit": counted(fits),
        "tokens_by_source": {name: percentiles(lengths) for name, lengths in sorted(by_source.items())},
        "exchanges": counted(str(len(r["messages"]) // 2) for r in rows),
        "scripts": counted(script(" ".join(m["content"][:250] for m in r["messages"][:2])) for r in rows),
    }  # fmt: skip


def counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles."""
    ordered = sorted(lengths)
    return {f"p{p}": ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES} if ordered else {}

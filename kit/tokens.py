"""Texts as token numbers for BLEU-4 and ROUGE-L: each word is split once, as sacreBLEU and rouge_score split it."""

from __future__ import annotations

import itertools
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial

import numpy as np
import numpy.typing as npt

from kit.config import RunConfig

Symbols = npt.NDArray[np.int64]
STANDARD = RunConfig.score_tokens  # schemes have sacreBLEU's names
ROUGE_TOKEN = re.compile("[a-z0-9]+")  # what rouge_score's tokenizer comes to, four times as fast


@cache
def _splitter(scheme: str) -> Callable[[str], list[str]]:
    from sacrebleu.metrics import BLEU

    tokenizer = BLEU(tokenize=scheme).tokenizer
    return lambda text: str(tokenizer(text)).split()


def _rouge(scheme: str, text: str) -> list[str]:
    """rouge_score's tokens; by another scheme than sacreBLEU's default, those of its tokens that have a letter, a vowel sign or a digit."""
    if scheme == STANDARD:
        return ROUGE_TOKEN.findall(text.lower())
    return [token for token in _splitter(scheme)(text.lower()) if any(unicodedata.category(c)[0] in "LMN" for c in token)]


class Vocabulary(dict[str, int]):
    """Every word met so far -> its number; it is split for "bleu" and for "rouge", and the tokens have numbers too.

    The rules of 13a and char look no further than the next space and no ROUGE token holds one, so the tokens of a text are its words' tokens in a row.
    By other schemes a text is one word.
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.split: dict[str, Callable[[str], list[str]]] = {"bleu": _splitter(scheme), "rouge": partial(_rouge, scheme)}
        self.tokens: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        self.symbols = {name: array("q") for name in self.split}
        self.ends = {name: array("q", [0]) for name in self.split}  # where a word's tokens end and the next one's begin

    def __missing__(self, word: str) -> int:
        for name, tokens_of in self.split.items():
            self.symbols[name].extend(map(self.tokens.__getitem__, tokens_of(word)))
            self.ends[name].append(len(self.symbols[name]))
        self[word] = len(self)
        return self[word]

    def numbers(self, texts: Sequence[str], name: str) -> list[Symbols]:
        """Each text's tokens as their numbers."""
        if not texts:
            return []
        words = [_words(text, self.scheme) for text in texts]
        found, last = np.concatenate(words), np.cumsum([len(w) for w in words]) - 1
        symbols, ends = np.array(self.symbols[name], dtype=np.int64), np.array(self.ends[name], dtype=np.int64)
        lengths = ends[found + 1] - ends[found]
        upto = np.cumsum(lengths)
        inside = np.arange(upto[-1]) - np.repeat(upto - lengths, lengths)
        return np.split(symbols[np.repeat(ends[found], lengths) + inside], upto[last][:-1])


vocabulary = cache(Vocabulary)


@lru_cache(maxsize=2**14)
def _words(text: str, scheme: str) -> Symbols:
    """A text's words as their numbers; kept for a while, since a reference comes back with every run."""
    text = text.rstrip()
    # 13a first takes these out, and may so join words: the text is one word.
    whole = scheme not in (STANDARD, "char") or "-\n" in text or "<skipped>" in text
    words = [text] if whole else text.replace("\n", " ").split(" ")
    return np.fromiter(map(vocabulary(scheme).__getitem__, words), dtype=np.int64)

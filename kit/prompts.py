"""The one place that renders text: conversations -> tokens, with the loss mask known by construction and never searched for.

A format is a scaffold (control text around the turns). The scaffold is tokenised with its control tokens, the turns without, so
that `<end_of_turn>` typed by a user stays plain characters. Supervised are each assistant turn's tokens and its terminator.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kit.conversations import INPUT
from kit.errors import UserError

IGNORE = -100
SLOT = re.compile("\ue000(\\d+)\ue001")
MARK = "\0"  # joins with no text that follows it
# Templates that tell the model the date (Llama 3.2's, SmolLM3's, Granite's) tell the same one in each run: Llama's own for want of a clock.
TODAY = datetime.date(2024, 7, 26)
Row = dict[str, Any]
# Answered by every run, for a reader to compare: to explain, to program, to list.
FIXED_PROMPTS = (
    "Why is the sky blue? Explain it so that a child of eight understands.",
    "Write a Python function that takes a list of words and returns the ones that read the same backwards.",
    "Name three ways in which a city can lower its greenhouse gas emissions, with one sentence on each.",
)


@dataclass(frozen=True)
class Example:
    """Token ids, labels (IGNORE where no loss is taken), and how the row was fitted: whole, or what was done, such as prompt_cut_and_reply_cut."""

    input_ids: list[int]
    labels: list[int]
    fit: str

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Exam:
    """A test row: the prompt's ids, the reference reply's ids with its terminator, and how it was fitted."""

    prompt_ids: list[int]
    reference_ids: list[int]
    fit: str


def fitted(**done: bool) -> str:
    """`whole`, or the names of what was done to a row, joined by "_and_"."""
    return "_and_".join(name for name, happened in done.items() if happened) or "whole"


class Renderer:
    """Renders conversations for one tokenizer, format ("chat" or "alpaca") and maximum length in tokens."""

    def __init__(self, tokenizer: Any, format: str, max_length: int) -> None:
        if format == "chat" and not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template; use --format alpaca")
        if tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no end-of-text token, at which replies could end")
        self.tokenizer, self.format, self.max_length = tokenizer, format, max_length
        probe = tokenizer("x")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        # Llama 2's tokenizer, and so TinyLlama's or Mistral's, puts a space before all that it is given: in the midst of a row one too many.
        (self.mark, alone, marked) = self._tokens([MARK, "x", f"{MARK}x"], [False] * 3)
        known = marked[: len(self.mark)] == self.mark and tokenizer.unk_token_id not in self.mark
        self.spaced = known and marked[len(self.mark) :] not in ([], alone)
        self.pieces, self.scaffold = functools.cache(self._pieces), functools.cache(self._scaffold)
        self.terminator = self._terminator()
        control = sum(map(len, self.scaffold(2, format == "alpaca")))
        if control > max_length // 2:
            raise UserError(f"--max-length {max_length} is too short: the {format} format alone takes {control} tokens of it")
        # `all_special_ids` are those alone that the tokenizer's settings name: Phi's <|end|> is not among them.
        special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        if self.terminator not in special:
            ends = f"the {format} format ends a reply with {tokenizer.decode([self.terminator])!r}, which is no control token of this model"
            raise UserError(ends + ("; use --format alpaca" if format == "chat" else ""))

    @property
    def stop_ids(self) -> list[int]:
        """Generation ends at the turn terminator or the end of text."""
        return sorted({self.terminator, self.tokenizer.eos_token_id})

    def _terminator(self) -> int:
        first, last = self.scaffold(4, False)[2], self.scaffold(4, False)[4]
        if not last or first[:1] != last[:1]:
            raise UserError(f"the {self.format} format does not end every reply with the same control token; use --format alpaca")
        return last[0]

    def _tokens(self, texts: Sequence[str], joined: Sequence[bool], **settings: Any) -> list[list[int]]:
        """The tokens of each text; a joined one gets no space before it."""
        given = [f"{MARK}{t}" if j else t for t, j in zip(texts, joined, strict=True)]
        made = self.tokenizer(given, add_special_tokens=False, verbose=False, **settings)["input_ids"]
        return [ids[len(self.mark) :] if j else ids for ids, j in zip(made, joined, strict=True)]

    def _pieces(self, turns: int, headed: bool) -> list[tuple[str, bool]]:
        """The turns + 1 pieces of control text around the turns, and whether the text after each is joined to it.

        `headed`: the first turn has a separate input. A space that ends a piece, as in Mistral's template, is the one that the tokenizer puts.
        """
        pieces = SLOT.split(self._chat_text(turns) if self.format == "chat" else self._alpaca_text(turns, headed))[::2]
        if not self.spaced:
            return [(p, False) for p in pieces]
        before, whole, (x,) = (self._tokens(t, [False] * len(t)) for t in ([p.removesuffix(" ") for p in pieces], [f"{p}x" for p in pieces], ["x"]))
        return [(p, True) if w != b + x else (p.removesuffix(" "), False) for p, b, w in zip(pieces, before, whole, strict=True)]

    def _scaffold(self, turns: int, headed: bool) -> list[list[int]]:
        """The pieces' tokens."""
        pieces = self.pieces(turns, headed)
        ids = self._tokens([p for p, _ in pieces], [self.spaced and i > 0 for i in range(len(pieces))])
        if self.bos and ids[0][:1] != self.bos:
            ids[0] = self.bos + ids[0]
        return ids

    def _chat_text(self, turns: int) -> str:
        from jinja2 import TemplateError

        messages = [{"role": ("user", "assistant")[i % 2], "content": f"\ue000{i}\ue001"} for i in range(turns)]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime)
        except (TemplateError, ValueError) as error:  # or several templates, none of them the default
            raise UserError(f"the model's chat template takes no turns of user and assistant alone ({error}); use --format alpaca") from None
        if SLOT.findall(text) != [str(i) for i in range(turns)]:
            raise UserError("the model's chat template does not keep every turn once and in order; use --format alpaca")
        return text

    def is_own_prompt(self, **settings: Any) -> bool:
        """Whether the template's own generation prompt, at today's date if it has one, is the one that replies are trained after."""
        asked = [{"role": "user", "content": "\ue0000\ue001"}]
        own: str = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **settings)
        return own.rstrip(" ") == self._chat_text(2).partition("\ue0001\ue001")[0].rstrip(" ")

    def _alpaca_text(self, turns: int, headed: bool) -> str:
        parts = []
        for i in range(turns):
            slot = f"\ue000{i}\ue001"
            extra = "\n\n### Input:\n\ue0000\ue001" if headed and i == 0 else ""
            parts.append(f"### Instruction:\n{slot}{extra}\n\n### Response:\n" if i % 2 == 0 else f"{slot}{self.tokenizer.eos_token}")
        return "\n\n".join("".join(parts[i : i + 2]) for i in range(0, turns, 2))

    def contents(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """The plain tokens of every part of every row, tokenised in one batch: literal control tokens stay characters."""
        parts = [self._parts(row) for row in rows]
        flat = [text for row in parts for text in row]
        joined = [False] * len(flat)
        if self.spaced:
            shapes = [(len(texts) - self._headed(row), self._headed(row)) for row, texts in zip(rows, parts, strict=True)]
            joined = [after for shape in shapes for _, after in self.pieces(*shape)[:-1]]
        ids = iter(self._tokens(flat, joined, split_special_tokens=True) if flat else [])
        return [[next(ids) for _ in row] for row in parts]

    def _headed(self, row: Row) -> bool:
        return self.format == "alpaca" and bool(row.get("input"))

    def _parts(self, row: Row) -> list[str]:
        texts = [m["content"] for m in row["messages"]]
        if self._headed(row):
            texts = [texts[0].removesuffix(f"{INPUT}{row['input']}"), row["input"], *texts[1:]]
        return texts

    def _interleave(self, row: Row, parts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
        """(control tokens, plain tokens) in order, and last the closing control tokens with no plain ones."""
        headed = self._headed(row)
        scaffold = self.scaffold(len(parts) - headed, headed)
        return list(zip(scaffold, [*parts, []], strict=True))

    def _prompt(self, row: Row, parts: list[list[int]]) -> list[int]:
        """The ids up to where the reply begins, as in training: a template's own generation prompt may differ (Qwen3's does)."""
        return [token for control, plain in self._interleave(row, [*parts, []])[:-1] for token in control + plain]

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Training examples, none longer than max_length and none without supervised tokens."""
        return [self._example(row, parts) for row, parts in zip(rows, self.contents(rows), strict=True)]

    def _example(self, row: Row, parts: list[list[int]]) -> Example:
        headed, all_parts = self._headed(row), parts
        ids, labels = self._labelled(row, parts)
        while len(ids) > self.max_length and len(parts) - headed > 2:
            parts = parts[:-2]
            ids, labels = self._labelled(row, parts)
        *prompt, reply = parts
        shorter = self._shortened(prompt, len(ids) - sum(map(len, parts)), reply)
        if shorter != prompt:
            ids, labels = self._labelled(row, [*shorter, reply])
        fit = fitted(turns_dropped=parts is not all_parts, prompt_cut=shorter != prompt, reply_cut=len(ids) > self.max_length)
        return Example(ids[: self.max_length], labels[: self.max_length], fit)

    def _labelled(self, row: Row, parts: list[list[int]]) -> tuple[list[int], list[int]]:
        """Ids and labels up to the last terminator: what follows it is for the next turn."""
        headed, ids, labels = self._headed(row), list[int](), list[int]()
        pieces = self._interleave(row, parts)
        for i, (control, plain) in enumerate(pieces):
            turn = max(i - headed, 0)
            after_reply = turn > 0 and turn % 2 == 0
            last = i == len(pieces) - 1
            control = control[:1] if last else control
            ids += control + plain
            labels += [control[0] if after_reply else IGNORE] + [IGNORE] * (len(control) - 1) if control else []
            labels += plain if turn % 2 == 1 else [IGNORE] * len(plain)
        return ids, labels

    def _shortened(self, prompt: list[list[int]], control: int, reply: list[int]) -> list[list[int]]:
        """Cuts the prompt where it must be, its longest part first, so that the reply keeps up to half of the room."""
        room = self.max_length - control
        over = sum(map(len, prompt)) - (room - min(len(reply), room // 2))
        prompt = list(prompt)
        while over > 0:
            longest = max(range(len(prompt)), key=lambda i: len(prompt[i]))
            keep = max(len(prompt[longest]) - over, 0)
            over -= len(prompt[longest]) - keep
            prompt[longest] = prompt[longest][:keep]
        return prompt

    def exams(self, rows: Sequence[Row]) -> list[Exam]:
        """Test rows: the conversation up to its last reply is the prompt, that reply the reference."""
        return [self._exam(row, parts) for row, parts in zip(rows, self.contents(rows), strict=True)]

    def _exam(self, row: Row, parts: list[list[int]]) -> Exam:
        *prompt, reply = parts
        whole, ids = prompt, self._prompt(row, prompt)
        reserve = min(len(reply) + 1, self.max_length // 2)
        while len(ids) + reserve > self.max_length and len(prompt) - self._headed(row) > 1:
            # The oldest exchange goes first; a separate input belongs to it.
            row, prompt = {**row, "input": ""}, prompt[2 + self._headed(row) :]
            ids = self._prompt(row, prompt)
        shorter = prompt
        if len(ids) + reserve > self.max_length:
            shorter = self._shortened(prompt, len(ids) - sum(map(len, prompt)) + 1, reply)
            ids = self._prompt(row, shorter)
        reference = [*reply, self.terminator][: self.max_length - len(ids)]
        return Exam(ids, reference, fitted(turns_dropped=prompt is not whole, prompt_cut=shorter != prompt, reply_cut=len(reference) <= len(reply)))


def plain_prompt(row: Row) -> str:
    """The prompt as a person reads it: the last user turn, with the earlier turns before it when there are any."""
    turns = row["messages"][:-1]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)

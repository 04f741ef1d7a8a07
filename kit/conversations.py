"""Raw rows -> conversations, in every shape that the field's datasets have. Another shape is a function in SHAPES.

A conversation is a list of {"role": "user" | "assistant", "content": str} that starts with the user, alternates and ends with the
assistant. Rows that cannot become one are dropped under a named reason; repairs are counted too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from kit.readers import ROLE, TURNS, Record, are_turns

INPUT = "\n\nInput: "
NO_INPUT = {"noinput", "<noinput>", "no input", "none", "n/a", "<no input>"}
# The names that the field's datasets give to a question, to what it is about and to its answer; of several, the first that says something counts.
ASKED, ABOUT, ANSWER = ("instruction", "prompt", "question", "query"), ("input", "context"), ("output", "completion", "response", "answer")
# To a system text beside the turns, and to a turn's text.
SYSTEM = ("system", "system_prompt")
CONTENT = ("content", "value", "text")
ROLES = {
    "user": "user", "human": "user", "prompter": "user", "customer": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "function_call": "tool", "function_response": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip


class Dropped(Exception):
    """A row that cannot become a conversation; the message is the reason that the manifest counts it under."""


class WrongShape(Exception):
    """A row that is not in its file's shape; the message says what was expected and what was found."""


def conversation(turns: list[tuple[str, str]], repairs: Counter[str]) -> list[dict[str, str]]:
    """Normalises (role, text) turns: system text goes into the user turn it follows or else the next, same-role turns merge, the ends are trimmed."""
    messages: list[dict[str, str]] = []
    system: list[str] = []
    for raw, text in turns:
        role = ROLES.get(raw.strip().lower())
        if role is None or role == "tool":
            raise Dropped("unknown_role" if role is None else "tool_turns")
        if role == "system" and text and messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += f"\n\n{text}"
        elif role == "system":
            system += [text] if text else []
        elif not text:
            raise Dropped("empty_reply" if role == "assistant" else "empty_prompt")
        elif not messages and role == "assistant":
            repairs["leading_assistant"] += 1
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
            repairs["merged_turns"] += 1
        else:
            parts = [*system, text] if role == "user" else [text]
            system = [] if role == "user" else system
            messages.append({"role": role, "content": "\n\n".join(parts)})
    if not any(m["role"] == "assistant" for m in messages):
        raise Dropped("no_reply" if messages else "no_exchange")
    if messages[-1]["role"] == "user":
        messages.pop()
        repairs["trailing_user"] += 1
    if system:
        repairs["trailing_system"] += 1
    return messages


def text_of(value: Any, repairs: Counter[str]) -> str:
    """A turn's text, trimmed: a string, or a list of parts, of which reasoning is left out."""
    if isinstance(value, list):
        value = "".join(_part(p, repairs) for p in value)
    if not isinstance(value, str):
        raise Dropped("not_text")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Dropped("invalid_unicode") from None
    return value.strip()


def _part(part: Any, repairs: Counter[str]) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind in ("reasoning", "thinking"):
        repairs["reasoning_left_out"] += 1
        return ""
    if kind in ("tool_call", "tool_use", "tool_result"):
        raise Dropped("tool_turns")
    text = next((part[k] for k in CONTENT if k in part), None) if isinstance(part, dict) else part
    if kind != "text" or not isinstance(text, str):
        raise Dropped("not_text")
    return text


def columns(row: Record) -> tuple[str, str | None, str]:
    """The row's names for question, input and answer, of several those that say something; WrongShape if it has no question or no answer."""
    there = ([k for k in names if k in row] for names in (ASKED, ABOUT, ANSWER))
    asked, about, answer = (next((k for k in names if row[k] not in (None, "", [])), names[0] if names else None) for names in there)
    if asked is None or answer is None:
        raise WrongShape(f"a question ({', '.join(ASKED)}) and an answer ({', '.join(ANSWER)}), found {', '.join(sorted(row)) or 'no keys'}")
    return asked, about, answer


def from_instruction(row: Record, repairs: Counter[str]) -> Record:
    """{instruction, input, output}, as in Alpaca, or by other names: an input follows the instruction as "\\n\\nInput: ..."."""
    asked, about, answer = columns(row)
    extra = _plain(_passages(row[about], repairs), repairs) if about else ""
    if extra.lower().rstrip(".") in NO_INPUT:
        extra = ""
        repairs["noinput"] += 1
    before, question = _history(row, repairs), _side(row[asked], "user", repairs)
    if not question or not question[-1][1]:
        raise Dropped("empty_prompt")
    if extra:
        last = max((i for i, (role, _) in enumerate(question) if ROLES.get(role) == "user"), default=0)
        question[last] = (question[last][0], f"{question[last][1]}{INPUT}{extra}")
    told = [*before, *question, *_side(row[answer], "assistant", repairs)]
    messages = conversation([*_system(row, told, repairs), *told], repairs)
    # Kept apart so that the Alpaca format can show it under its own heading, which belongs to the first question.
    return {"messages": messages, "input": extra} if extra and not before and len(question) == 1 else {"messages": messages}


def _side(value: Any, role: str, repairs: Counter[str]) -> list[tuple[str, str]]:
    """A question or an answer as turns: a text, or a list of turns itself, as TRL has them."""
    if are_turns(value):
        return [_turn(t, repairs) for t in value]
    return [(role, _plain(value, repairs))]


def _passages(value: Any, repairs: Counter[str]) -> Any:
    """What a question is about may be several texts, which follow each other."""
    if not value or not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        return value
    repairs["passages_joined"] += 1
    return "\n\n".join(part.strip() for part in value)


def _plain(value: Any, repairs: Counter[str]) -> str:
    """A cell's text: a number is its digits, nothing is empty, and a list of texts, such as of answers to choose from, is no text."""
    if isinstance(value, list) and any(isinstance(part, str) for part in value):
        raise Dropped("not_text")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text_of(str(value) if number else "" if value is None else value, repairs)


def _system(row: Record, told: list[tuple[str, str]], repairs: Counter[str]) -> list[tuple[str, str]]:
    """The system text that stands beside the turns, as a turn, unless these have one."""
    text = next((row[k] for k in SYSTEM if row.get(k)), None)
    if not isinstance(text, str) or any(ROLES.get(role.strip().lower()) == "system" for role, _ in told):
        return []
    repairs["system_text_beside_the_turns"] += 1
    return [("system", text_of(text, repairs))]


def _history(row: Record, repairs: Counter[str]) -> list[tuple[str, str]]:
    """Earlier exchanges, [[question, reply], ...], as turns."""
    pairs = row.get("history")
    if not pairs or not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        return []
    repairs["history_before_the_instruction"] += 1
    return [(role, text_of(text, repairs)) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def from_turns(row: Record, repairs: Counter[str]) -> Record:
    """A list of turns under any of TURNS, each turn with a role and a text under any of ROLE and CONTENT."""
    key = next((k for k in TURNS if isinstance(row.get(k), list)), None) or next((k for k in TURNS if k in row), None)
    turns = row.get(key) if key else None
    if not isinstance(turns, list):
        found = type(turns).__name__ if key else f"keys {', '.join(sorted(row))}"
        raise WrongShape(f"a list of turns under one of {', '.join(TURNS)}, found {found}")
    told = [_turn(t, repairs) for t in turns]
    return {"messages": conversation([*_system(row, told, repairs), *told], repairs)}


def _turn(turn: Any, repairs: Counter[str]) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise WrongShape(f"turns that are objects, found {type(turn).__name__}")
    role, content = (next((k for k in names if k in turn), None) for names in (ROLE, CONTENT))
    if role is None or content is None or not isinstance(turn[role], str):
        raise WrongShape(f"turns with a role ({', '.join(ROLE)}) and a text ({', '.join(CONTENT)}), found {', '.join(sorted(turn))}")
    if turn[content] is None and turn.get("tool_calls"):
        raise Dropped("tool_turns")
    return turn[role], text_of(turn[content], repairs)


SHAPES = {"instruction": from_instruction, "turns": from_turns}


def shape_of(row: Record) -> tuple[str, str]:
    """The shape that a file's first row shows, and the columns it was told by."""
    if found := next((k for k in TURNS if isinstance(row.get(k), list)), None):
        return "turns", found
    try:
        used = [name for name in columns(row) if name]
        unused = [k for names in (ASKED, ABOUT, ANSWER) for k in names if k in row and k not in used]
        return "instruction", ", ".join(used) + (f" (not from {', '.join(unused)})" if unused else "")
    except WrongShape as missing:
        if found := next((k for k in TURNS if k in row), None):
            return "turns", found
        raise WrongShape(f"a list of turns under one of {', '.join(TURNS)}, or {missing}; rename the columns to instruction and output") from None

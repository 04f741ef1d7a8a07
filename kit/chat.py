"""A conversation with a run in the terminal: replies appear as they are made, greedily, as in evaluation."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from typing import Any, TextIO

from kit.config import BASE, RunConfig
from kit.console import printable, say
from kit.generation import ends
from kit.model import load_base, load_trained
from kit.prompts import Renderer

HELP = "/base: the untuned model and back, /new: forget the conversation, /quit"


def aside() -> contextlib.AbstractContextManager[Any]:
    """Where nobody types, as through a pipe, standard output is for replies alone: what is printed otherwise goes to standard error."""
    return contextlib.nullcontext() if sys.stdin.isatty() else contextlib.redirect_stdout(sys.stderr)


def chat(config: RunConfig, replies: TextIO | None = None) -> None:
    """Reads lines from the terminal or a pipe until /quit or its end; the replies go to a stream, standard output unless another is given."""
    replies = replies or sys.stdout
    with aside():
        _talk(config, replies)


def _talk(config: RunConfig, replies: TextIO) -> None:
    model, tokenizer, _ = load_trained(config)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    untuned: Any = model if config.method == BASE else None
    name, messages = config.run_name, list[dict[str, str]]()
    say(f"{config.run_dir}; {HELP}")
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text must not end the conversation
        sys.stdin.reconfigure(errors="replace")
    while (line := _line(f"{name}> ")) not in (None, "/quit"):
        if line == "/new":
            messages = []
        elif line == "/base":
            name = config.run_name if name == BASE else BASE
            if name == BASE and config.technique.full and untuned is None:
                untuned = load_base(replace(config, method=BASE))[0]
        elif line.startswith("/"):
            say(HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            without = model.disable_adapter() if name == BASE and untuned is None else contextlib.nullcontext()
            with without:
                reply = _reply(config, untuned or model if name == BASE else model, renderer, messages, replies)
            messages.append({"role": "assistant", "content": reply})


def _line(prompt: str) -> str | None:
    """The next line, or None at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (the arrow keys edit the line and bring back earlier ones)
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _reply(config: RunConfig, model: Any, renderer: Renderer, messages: list[dict[str, str]], replies: TextIO) -> str:
    """Prints the reply as it is made and returns it; Ctrl-C ends it there. What does not fit into the maximum length is the oldest exchange."""
    import torch
    from transformers import TextStreamer

    said: list[str] = []

    class Printer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)
            print(printable(text), end="\n" if stream_end else "", flush=True, file=replies)

    prompt = renderer.exams([{"messages": [*messages, {"role": "assistant", "content": ""}]}])[0].prompt_ids
    ids, tokenizer = torch.tensor([prompt], device=model.device), renderer.tokenizer
    settings = {
        "do_sample": False, "max_length": None, "max_new_tokens": config.max_new_tokens,
        "eos_token_id": ends(model.generation_config, renderer), "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    try:
        streamer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
    except KeyboardInterrupt:
        print(" (stopped)")
    return "".join(said).strip()

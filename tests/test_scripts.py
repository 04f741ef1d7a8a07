"""One small run of the tiny model, and what one does with it: its card, chat, export; and doctor, before anything is run."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, config, places, script
from hub_server import TOKEN, Hub, Repo

from kit import card, doctor, gates
from kit.chat import chat
from kit.config import RunConfig
from kit.conversations import conversation
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.export import export, sentencepiece
from kit.files import read_json, read_jsonl, write_json
from kit.hub import BUILTIN
from kit.methods import METHODS
from kit.preflight import Need
from kit.prompts import Renderer
from kit.settings import resolve
from kit.training import train

SMALL = ("--limit-train", "160", "--limit-test", "9", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """qlora, trained for twenty steps, and its base, both evaluated."""
    flags = [*SMALL, *places(tmp_path_factory.mktemp("run"))]
    made = config("--method", "qlora", *flags)
    train(made)
    evaluate(made)
    evaluate(config("--method", "base", *flags))
    return made


def answers(run: RunConfig, name: str) -> dict[str, str]:
    """Replies by prompt, of single questions."""
    rows = read_jsonl(run.run_dir.parent / name / "predictions.jsonl")
    return {r["prompt"]: r["prediction"] for r in rows if "\n" not in r["prompt"]}


def test_the_kits_card_replaces_pefts(run: RunConfig) -> None:
    from huggingface_hub import ModelCard

    path = run.run_dir / "adapter" / "README.md"
    assert "More Information Needed" not in path.read_text()
    card.write(run, read_json(run.run_dir / "train.json"))
    os.utime(path, (0, 0))  # as a kill between the scores and the card leaves it
    evaluate(run)
    results = {r.metric_type: r.metric_value for r in ModelCard.load(path).data.eval_results if r.dataset_type == "mixture"}
    scores = read_json(run.run_dir / "eval.json")["all"]
    assert results == pytest.approx(
        {"bleu": scores["bleu4"]["value"], "rouge": scores["rouge_l"]["value"], "perplexity": scores["perplexity"]["value"]}, abs=1e-4
    )


def printed(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the first snippet of a folder's card prints."""
    code = re.findall("```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)[0]
    capsys.readouterr()
    exec(code, {"FOLDER": str(model)})
    return capsys.readouterr().out


def test_the_cards_snippet_loads_the_adapter(run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)  # it names the built-in model by its place in the repository
    assert printed(run.run_dir / "adapter", capsys).strip()


def typed(monkeypatch: pytest.MonkeyPatch, keys: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(keys), encoding="utf-8"))


def test_chat_answers_as_the_evaluation_did_and_shows_the_base(run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, base = answers(run, "qlora-s0"), answers(run, "base")
    prompt = next(p for p in tuned if tuned[p] != base[p])
    typed(monkeypatch, f"{prompt}\n/new\n/base\n{prompt}\n/help\n\xff\n/quit\nnever read\n".encode("latin-1"))
    chat(run)
    said, asked = capsys.readouterr()
    # The replies alone, for whoever reads them at the other end of the pipe.
    assert said.startswith(f"{tuned[prompt]}\n{base[prompt][:20]}")  # the base in 4 bits here, in 16 in its own evaluation
    assert len(said.splitlines()) == 3
    assert asked.count("qlora-s0> ") == 3
    assert asked.count("base> ") == 4
    assert asked.count("/quit") == 2
    assert "never read" not in said + asked


def test_a_person_at_a_terminal_sees_everything_in_one_place(run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, b"one\n/quit\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("kit.chat._reply", lambda *given: print("reply", file=given[-1]))
    chat(run)
    said, elsewhere = capsys.readouterr()
    assert "qlora-s0> reply\nqlora-s0> " in said
    assert elsewhere == ""


def test_the_script_keeps_its_announcements_from_the_replies(tmp_path: Path) -> None:
    done = script("chat", "--method", "base", *places(tmp_path))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "recipe tiny: " in done.stderr
    assert done.stderr.endswith("base> \n")


def test_chat_knows_what_was_said_before(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("kit.chat._reply", lambda *given: seen.append(len(given[-2])) or "reply")
    typed(monkeypatch, b"one\ntwo\n\n/new\nthree\n")
    chat(run)
    assert seen == [1, 3, 1]


def test_a_reply_cannot_command_the_terminal(run: RunConfig, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import GenerationConfig

    from kit.chat import _reply

    class Model:
        device = "cpu"
        generation_config = GenerationConfig()

        def generate(self, input_ids: Any, streamer: Any, **_: Any) -> None:
            streamer.put(input_ids)
            for token in tokenizer("red \x1b[31m text 🙂", add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([token]))
            streamer.end()

    reply = _reply(run, Model(), Renderer(tokenizer, "chat", 256), [{"role": "user", "content": "x"}], sys.stdout)
    assert reply == "red \x1b[31m text 🙂"
    assert capsys.readouterr().out == "red \\x1b[31m text 🙂\n"


def test_an_exported_model_is_the_run_in_16_bits(run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer

    target = tmp_path / "out"
    found = export(run, target)
    assert re.search(r"adapter on the 16-bit model differ by \d\.\de-0\d nats", found)
    with safe_open(target / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert not (target / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert "quantization_config" not in read_json(target / "config.json")
    assert len({p.stat().st_mode for p in target.iterdir()}) == 1
    assert printed(target, capsys).strip()
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        export(run, target)


def test_an_export_that_differs_or_does_not_fit_leaves_nothing(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gates.BOUNDS, "bfloat16", 1e-9)
    with pytest.raises(UserError, match="nothing is exported: the exported model and the adapter"):
        export(run, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("kit.export.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 5 MiB of disk and .* has 0 MiB free"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_done_cannot_be_exported(run: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / run.name / run.run_name)
    write_json(tmp_path / run.name / run.run_name / "train.json", {"status": "oom"})
    done = script("export", str(tmp_path / run.name / run.run_name), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "is no trained run; run: python scripts/train.py --method qlora --seed 0" in done.stderr
    assert script("export", str(tmp_path)).stderr == "error: --out DIR is needed (to make: OUT=DIR): the folder to write the model to\n"


@pytest.mark.parametrize("kind", ["tokenizer", "gpt2_tokenizer"])
def test_the_alpaca_template_renders_what_the_run_was_tuned_on(kind: str, request: pytest.FixtureRequest) -> None:
    from kit.export import ALPACA

    tokenizer = request.getfixturevalue(kind)
    renderer = Renderer(tokenizer, "alpaca", 256)
    turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant", "user"), ("Do it.", "Done.", "Do it."), strict=True)]
    exam = renderer.exams([{"messages": [*turns, {"role": "assistant", "content": "x"}]}])[0]
    template = ("{{ bos_token }}" if renderer.bos else "") + ALPACA
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.decode(exam.prompt_ids)
    told = conversation([("system", "Be brief."), *((t["role"], t["content"]) for t in turns), ("assistant", "x")], Counter())
    exam = renderer.exams([{"messages": told}])[0]
    turns.insert(0, {"role": "system", "content": "Be brief."})
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.decode(exam.prompt_ids)


def test_the_sentencepiece_file_comes_along(tmp_path: Path) -> None:
    """transformers leaves it out, and llama.cpp's converter reads Gemma's vocabulary from nothing else."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(BUILTIN["builtin"], base)
    out.mkdir()
    for content in (None, b"pieces"):
        if content:
            (base / "tokenizer.model").write_bytes(content)
        sentencepiece(resolve({"recipe": "tiny", "model": str(base)}), out)
        assert ((out / "tokenizer.model").read_bytes() if content else list(out.iterdir())) == (content or [])


def said_by_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "doctor.py"), run_name="__main__")
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_doctor_finds_this_machine_usable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said_by_doctor(monkeypatch, capsys, "--recipe", "tiny", "--json")
    found = json.loads(out)
    assert (code, found["usable"]) == (0, True), err
    names = {c["name"]: c for c in found["checks"]}
    assert {"system", "gpu", "packages", "libraries", "4-bit", "hub", "precision", "memory", "methods", "disk"} == set(names)
    assert "multiplies with NF4 weights on the cpu" in names["4-bit"]["detail"]
    assert "UNSLOTH_FORCE_CPU=1" in names["gpu"]["detail"]
    assert re.findall(r"(\w+) \d+ MiB", names["methods"]["detail"]) == [m for m in METHODS if m != "combined"]


def test_doctor_says_which_methods_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"qlora": Need(4, 1, 2, 0), "lora": Need(8, 1, 2, 0), "full": Need(8, 16, 2, 0)}
    monkeypatch.setattr("kit.doctor.total_memory", lambda: 10)
    monkeypatch.setattr("kit.doctor.count", lambda config, _: needs.get(config.method, needs["qlora"]))
    detail = {c.name: c.detail for c in doctor.fits(config("--recipe", "tiny"))}["methods"]
    assert "qlora 0 MiB, lora 0 MiB (may not), dora 0 MiB, " in detail
    assert "full 0 MiB (cannot fit), " in detail
    monkeypatch.undo()
    half = {c.name: c.detail for c in doctor.fits(config("--recipe", "tiny", "--precision", "float16"))}["methods"]
    assert "galore (not with these settings), " in half
    wrong = {c.name: c.ok for c in doctor.fits(config("--model", "builtin-gptneo", "--format", "alpaca"))}
    assert wrong == {"layers": False}


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.Linear4bit", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("kit.runs.version", lambda name: None if name == "peft" else importlib.metadata.version(name))
    code, out, err = said_by_doctor(monkeypatch, capsys, "--recipe", "tiny")
    assert code == 2
    assert "✗ 4-bit      ZeroDivisionError" in out
    assert "peft missing" in out
    assert "error: packages: run: make setup" in err


def test_doctor_looks_for_what_triton_builds_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.compiler()) == []  # no GPU, no need
    monkeypatch.setattr(doctor, "cuda_gpu", lambda: ("a GPU", ""))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    [found] = doctor.compiler()
    assert found.ok is False
    assert found.detail.startswith("no C compiler")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub({"lab/gated": Repo(gated=True), "lab/open": Repo()})
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_doctor_asks_the_hub_and_keeps_the_token_to_itself(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    asked: Callable[[], dict[str, Any]] = lambda: {c.name: c for c in doctor.hub(config("--model", "lab/gated", "--source", "tulu=lab/open"))}  # noqa: E731
    found = asked()
    assert found["token"].detail == "a Hugging Face token is set"
    assert (found["model"].ok, found["dataset"].ok) == (False, True)
    assert "accept its licence on its page" in found["model"].fix
    hub.repos["lab/gated"].accepted = True
    accepted = asked()
    assert accepted["model"].ok
    assert TOKEN not in f"{found}{accepted}"


@pytest.mark.usefixtures("hub")
def test_doctor_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = {c.name: c for c in doctor.hub(config("--model", "lab/gated"))}
    assert not found["model"].ok
    assert found["model"].detail == "the hub cannot be reached and lab/gated is not in the local cache"

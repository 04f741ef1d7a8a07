"""Training in this process: every method, its gates, the same trajectory however the batch is split, and out of memory handled."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import places

from kit import training
from kit.checkpoints import last_checkpoint
from kit.cli import parser
from kit.config import RunConfig, load_recipe, recipes
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import held, read_json, read_jsonl, write_json
from kit.hub import load_tokenizer
from kit.methods import METHODS
from kit.model import built, import_unsloth
from kit.progress import AT_MOST, TrainingProgress
from kit.report.rows import collect
from kit.resources import Phases, is_memory_error
from kit.settings import resolve
from kit.trainer import Kit, tracker
from kit.training import train

Make = Callable[..., RunConfig]
SHORT = ("--limit-train", "128", "--limit-test", "6", "--valid-per-source", "4", "--max-new-tokens", "8", "--forgetting-text", "none")
FEW = ("--train-per-source", "60", "--test-per-source", "6")
# Methods that train.json counts differently or whose cost is their parts'.
SINGLE = [m for m, method in METHODS.items() if not method.parts]


def log(config: RunConfig) -> list[dict[str, Any]]:
    return list(read_jsonl(config.run_dir / "log.jsonl"))


@pytest.mark.parametrize(("steps", "rates"), [(1, [1]), (2, [0, 1]), (3, [0, 1, 0.5])])
def test_warm_up_leaves_a_step_at_the_full_rate(ready: Make, steps: int, rates: list[float]) -> None:
    """Of one step a warm-up of 3%, rounded up, would be all: a training that changes nothing."""
    config = ready("--method", "lora", *SHORT, "--max-steps", str(steps))
    record = train(config)
    assert [r["learning_rate"] / config.learning_rate for r in log(config)] == rates
    assert record["gates"]["moved"]["passed"] is not False


@pytest.mark.parametrize("method", [m for m in SINGLE if m != "qlora"])  # qlora: tests/test_end_to_end.py
def test_every_method_trains_saves_and_passes_its_gates(ready: Make, method: str) -> None:
    config = ready("--method", method, *SHORT, "--limit-train", "64", "--accumulation", "1")  # 16 steps, the fewest whose learning rate is judged
    record = train(config)
    gates = record["gates"] | evaluate(config)["gates"]
    assert {"supervised_text", "terminator", "gradients", "moved", "learning_rate", "loss_fell", "finite", "reloaded", "batched"} == set(gates)
    assert {name: gate for name, gate in gates.items() if not gate["passed"]} == {}
    assert record["precision"]["name"] == "float32"
    assert record["valid_perplexity"] < 130  # the untuned model's is above
    assert record["predicted_memory_gib"] > 0
    if (saved := config.run_dir / "adapter" / "adapter_config.json").exists():
        assert read_json(saved)["target_modules"] == sorted(config.target_modules)  # the same bytes from every process
    row = collect(config.run_dir.parent)[0]
    assert (row["status"], row["ranked"], row["reason"]) == ("done", True, None)


@pytest.mark.parametrize(("method", "ratio"), [("lora", 1), ("loraplus", 16)])
def test_lora_plus_has_a_rate_of_its_own_for_b(ready: Make, method: str, ratio: float) -> None:
    """Adam's first step is the learning rate, whatever the gradient; A has none yet."""
    from safetensors.torch import load_file

    config = ready("--method", method, *SHORT, "--max-steps", "1", "--learning-rate", "1e-3", "--weight-decay", "0")
    train(config)
    assert [r["learning_rate"] for r in log(config)] == [1e-3]
    weights = load_file(config.run_dir / "adapter" / "adapter_model.safetensors")
    moved = {n: float(w.abs().median()) for n, w in weights.items() if "lora_B" in n}
    assert len(moved) == 42
    assert moved == pytest.approx(dict.fromkeys(moved, ratio * 1e-3), rel=0.02)


def test_a_mixture_trains_on_its_replies_alone(ready: Make, tmp_path: Path) -> None:
    """TRL's balance of the experts fails for Granite's; what it sets for the others made the trained model fail where it generates."""
    from transformers import GraniteMoeConfig

    import_unsloth()
    tokenizer = load_tokenizer("builtin")
    settings = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    model = built(GraniteMoeConfig(**settings, num_attention_heads=4, num_key_value_heads=4))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mixture")
    config = ready("--method", "full", *SHORT, "--max-steps", "3", "--model", str(tmp_path / "mixture"))
    assert train(config)["gates"]["loss_fell"]["passed"]
    assert not read_json(config.run_dir / "model" / "config.json")["output_router_logits"]
    assert evaluate(config)["gates"]["reloaded"]["passed"]


@pytest.mark.parametrize(("recipe", "method"), [(r, p["method"]) for r in recipes() for p in load_recipe(r).get("published", [])])
def test_the_published_set_ups_run_scaled_down(tmp_path: Path, built: Path, recipe: str, method: str) -> None:
    """Each set-up's method, format and batch on the built-in model of its family, from data to scores."""
    flags = ("--recipe", recipe, "--scale-down", "--method", method, *SHORT, *FEW, "--max-steps", "3", *places(tmp_path), "--data-dir", str(built / recipe))
    config = resolve(parser("").parse(flags))
    record = train(config)
    assert record["steps"] == 3
    scored = evaluate(config)
    assert scored["all"]["perplexity"]["value"] > 1
    gates = record["gates"] | scored["gates"]
    assert {name: gate for name, gate in gates.items() if gate["passed"] is False} == {}


def test_gpt_neo_has_no_chat_template_and_no_pad_token(ready: Make) -> None:
    with pytest.raises(UserError, match="has no chat template; use --format alpaca"):
        train(ready("--model", "builtin-gptneo", "--format", "chat", "--target-modules", "q_proj"))


def test_only_what_a_method_trains_has_optimiser_state(ready: Make) -> None:
    """GaLore's and APOLLO's state is smaller than Adam's on the same weights; the embeddings are left alone unless asked for."""
    states = {m: train(ready("--method", m, "--limit-train", "16", "--no-train-embeddings"))["optimizer_state_mib"] for m in ("full", "galore", "apollo")}
    assert states["apollo"] < states["galore"] < 0.7 * states["full"]


def test_the_kits_dora_trains_as_pefts_does(ready: Make, tmp_path: Path) -> None:
    logs = []
    for kernel in ("kit", "peft"):
        config = ready("--method", "qdora", *SHORT, "--max-steps", "5", "--dora-kernel", kernel, "--runs-dir", str(tmp_path / kernel))
        train(config)
        logs.append([r["loss"] for r in log(config)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


def test_accumulation_does_not_change_the_trajectory(ready: Make, tmp_path: Path) -> None:
    """1 x 8 and 8 x 1 are the same effective batch: the same rows, the same loss but for the order of the sums."""
    curves = []
    for micro, accumulation in ((8, 1), (1, 8)):
        batch = ("--micro-batch", str(micro), "--accumulation", str(accumulation), "--runs-dir", str(tmp_path / str(micro)))
        config = ready("--method", "lora", *SHORT, "--max-steps", "4", *batch)
        train(config)
        curves.append([r["loss"] for r in log(config)])
    for other in curves[1:]:
        drift = [abs(a - b) / a for a, b in zip(curves[0], other, strict=True)]
        assert max(drift) < 2e-3
        assert sum(drift) / len(drift) < 5e-4


def test_the_same_rows_in_the_same_order_for_every_method(ready: Make) -> None:
    logs = []
    for method in ("lora", "galore"):
        config = ready("--method", method, *SHORT, "--max-steps", "4")
        train(config)
        logs.append([(r["tokens"], r["supervised"]) for r in log(config)])
    assert logs[0] == logs[1]


def test_the_trainer_computes_in_the_recorded_precision(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL turns bfloat16 autocast on by itself where the processor has it, which would make the recorded float32 a lie."""
    import_unsloth()
    found = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate's launcher, by a settings file of other trainings
    monkeypatch.setattr(Kit, "create_optimizer", lambda self: found.append((self.args.bf16, self.args.fp16, self.accelerator.mixed_precision)) or 1 / 0)
    monkeypatch.setattr("unsloth_zoo.cpu.trainer.cpu_bf16_supported", lambda: True)
    with pytest.raises(ZeroDivisionError):
        train(ready("--method", "lora", *SHORT))
    assert found == [(False, False, "no")]


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    real = Kit.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["labels"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Kit, "training_step", step)


def test_out_of_memory_names_the_batch_that_fits(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 2)
    config = ready("--method", "lora", *SHORT)
    with pytest.raises(UserError, match=r"out of memory while training \(warmup\); this fits at the same effective batch: --micro-batch 2 --accumulation 4"):
        train(config)
    record = read_json(config.run_dir / "train.json")
    assert (record["status"], record["phase"], record["largest_micro_batch"]) == ("oom", "warmup", 2)
    assert record["peak_memory_gib"] > 0
    assert collect(config.run_dir.parent)[0]["status"] == "oom"


def test_no_batch_is_named_where_the_optimisers_state_does_not_fit(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = ready("--method", "lora", *SHORT, "--auto-batch")
    with pytest.raises(UserError, match=r"out of memory while training \(warmup\); lower --micro-batch"):
        train(config)
    assert read_json(config.run_dir / "train.json")["largest_micro_batch"] is None


def test_a_run_belongs_to_one_process_at_a_time(ready: Make) -> None:
    config = ready("--method", "lora", *SHORT)
    with held(config.run_dir), pytest.raises(UserError, match="lora-s0 is in use by another process; wait for it to end, or choose another --name"):
        train(config)


def test_a_file_system_without_locks_is_worked_on_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert "this file system cannot lock: start no second command" in capsys.readouterr().out


def test_a_step_whose_gradients_overflowed_is_not_looked_at(tmp_path: Path) -> None:
    model, progress = torch.nn.Linear(2, 1), TrainingProgress(tmp_path / "log.jsonl", Phases(), 0)
    for value in (float("inf"), 0.0, float("nan"), 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        progress.on_pre_optimizer_step(None, None, None, model=model)
        assert progress.fed == ({} if value == float("inf") else dict.fromkeys(("weight", "bias"), value == 1.0))
    assert progress.looked == 2


def test_a_tensor_whose_first_gradients_are_too_small_is_looked_at_for_longer(tmp_path: Path) -> None:
    """In float16 without a loss scaler, as Unsloth computes Gemma 3 on a T4, LoRA's A may have none while B is hardly more than zero."""
    model, progress = torch.nn.Linear(2, 1), TrainingProgress(tmp_path / "log.jsonl", Phases(), 0)
    for step in range(5):
        model.weight.grad, model.bias.grad = torch.full((1, 2), float(step == 4)), torch.ones(1)
        progress.on_pre_optimizer_step(None, None, None, model=model)
        assert progress.fed == {"weight": step == 4, "bias": True}
    progress.on_pre_optimizer_step(None, None, None, model=model)
    assert progress.looked == 5
    progress.fed, progress.looked = {"weight": False}, AT_MOST
    progress.on_pre_optimizer_step(None, None, None, model=model)
    assert progress.fed == {"weight": False}


def test_a_step_that_compiles_counts_as_the_mean_of_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, now, graphs = TrainingProgress(tmp_path / "log.jsonl", Phases(), 0), [0.0], [0]
    monkeypatch.setattr("kit.progress.clock", lambda: now[0])
    monkeypatch.setattr("kit.progress.compiled", lambda: graphs[0])
    args, control = SimpleNamespace(device="cpu"), SimpleNamespace()
    progress.on_train_begin(args, SimpleNamespace(max_steps=5, global_step=0), control)
    for step, (seconds, made) in enumerate(((9, 3), (1, 0), (3, 0), (50, 2), (2, 0)), 1):
        progress.on_step_begin(args, None, control)
        now[0], graphs[0] = now[0] + seconds, graphs[0] + made
        progress.on_step_end(args, None, control)
        progress.on_log(args, SimpleNamespace(seen=[10 * step, step], global_step=step), control, {"loss": 1.0, "learning_rate": 1.0})
    progress.on_train_end(args, None, control)
    assert [row["wall_s"] for row in progress.rows] == [0, 1, 4, 6, 8]
    assert progress.totals()["tokens_per_s"] == 40 / 8


def test_a_trained_model_that_is_gone_is_trained_again_and_a_damaged_one_named(ready: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = ready("--method", "galore", *SHORT, "--max-steps", "3", "--name", "gone")
    train(config)
    with pytest.raises(UserError, match="was made with other settings"):
        train(ready("--method", "galore", *SHORT, "--max-steps", "3", "--name", "gone", "--learning-rate", "1e-5"))
    (config.run_dir / "model" / "model.safetensors").unlink()
    answers = [config.run_dir / name for name in ("eval.json", "predictions.jsonl", "samples.json", "tasks.json")]
    for path in answers:
        path.write_text("{}")
    train(config)
    capsys.readouterr()
    assert [path for path in answers if path.exists()] == []  # of a model that is no more
    (config.run_dir / "eval.json").write_text("{}")
    train(config)
    assert "is trained already" in capsys.readouterr().out
    assert (config.run_dir / "eval.json").exists()
    adapted = ready("--method", "lora", *SHORT, "--max-steps", "3", "--name", "gone")
    train(adapted)
    weights = adapted.run_dir / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"adapter is damaged .*; remove it and train again"):
        evaluate(adapted)


def test_out_of_memory_in_the_checks_is_told_apart(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("kit.gates.fingerprint", fingerprint)
    with pytest.raises(UserError, match=r"out of memory while training \(checks before training\)"):
        train(ready("--method", "lora", *SHORT))


@pytest.mark.parametrize("said", ["CUDA error", "CUDA driver error", "Triton Error [CUDA]"])
def test_memory_that_a_compiled_kernel_lacks_is_memory(said: str) -> None:
    assert is_memory_error(RuntimeError(f"{said}: out of memory"))
    assert not is_memory_error(RuntimeError(f"{said}: an illegal memory access was encountered"))


def test_what_is_said_to_fit_has_room_for_the_optimisers_state(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out before the first step: the state is not there yet."""
    from kit import training

    made: list[int] = []

    def probed(trainer: Any, config: RunConfig) -> int | None:
        assert not trainer.optimizer.state
        fits = largest_that_fits(trainer, config)
        made.append(len(trainer.optimizer.state))
        return fits

    largest_that_fits = training.largest_that_fits
    monkeypatch.setattr(training, "largest_that_fits", probed)
    out_of_memory_above(monkeypatch, 2)
    with pytest.raises(UserError, match="--micro-batch 2 --accumulation 4"):
        train(ready("--method", "lora", *SHORT))
    assert made == [84]


def test_auto_batch_keeps_the_effective_batch(ready: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after a kill, and then the micro-batch that was found to fit is not looked for again."""
    whole = ready("--method", "lora", *SHORT, "--max-steps", "4", "--name", "whole")
    train(whole)
    out_of_memory_above(monkeypatch, 2)
    config = ready("--method", "lora", *SHORT, "--max-steps", "4", "--auto-batch")
    with killed(monkeypatch):
        train(config)
    assert "out of memory: going on with micro-batch 2 and accumulation 4" in capsys.readouterr().out
    record = train(config)
    assert (record["micro_batch"], record["accumulation"], record["steps"]) == (2, 4, 4)
    assert record["gates"]["gradients"]["passed"]  # of the steps before it was killed
    assert [r["loss"] for r in log(config)] == pytest.approx([r["loss"] for r in log(whole)], rel=1e-3)
    shown = capsys.readouterr().out
    assert "going on from checkpoint-4" in shown
    assert "out of memory" not in shown


@contextlib.contextmanager
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the last step, whose checkpoint is there, and before the trained model is saved."""
    with monkeypatch.context() as patch:
        patch.setattr("kit.training.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            yield


def test_killed_after_the_last_step_it_makes_no_other_one(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hybrid in the middle: its first half ends before its epoch does."""
    flags = ("--method", "hybrid", *SHORT, "--limit-train", "32", "--schedule", "constant")
    config, whole = ready(*flags), ready(*flags, "--name", "whole")
    with killed(monkeypatch):
        train(config)
    assert read_json(config.run_dir / "train.json")["reason"] == "stopped; the same command goes on where it stopped"
    made = [[r["steps"], r["tokens_total"], r["parts"][0]["steps"]] for r in (train(config), train(whole))]
    assert made[0] == made[1]
    assert log(config) != []
    assert [r["loss"] for r in log(config)] == [r["loss"] for r in log(whole)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "full", "--learning-rate", "1e30", "--max-grad-norm", "1e30", "--warmup-ratio", "0"), r"the loss of step \d+ is nan"),
        (("--method", "lora", "--max-steps", "2", "--weight-decay", "1e18"), ".*"),  # in the last step, after which no loss is logged
    ],
)
def test_a_training_that_diverges_fails_with_its_reason(ready: Make, flags: tuple[str, ...], said: str) -> None:
    config = ready(*SHORT, *flags)
    with pytest.raises(UserError, match=rf"training diverged: {said}; lower --learning-rate") as refused:
        train(config)
    record = read_json(config.run_dir / "train.json")
    assert (record["status"], record["reason"]) == ("failed", str(refused.value))


def test_a_run_that_is_trained_again_shows_no_earlier_end(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in the meantime, or after a kill, would call it cancelled at a step that is long past."""
    config, seen = ready("--method", "lora", *SHORT, "--max-steps", "1"), list[str]()
    write_json(config.run_dir / "train.json", {"status": "cancelled", "reason": "stopped at step 28"})
    save = training.save

    def watched(*args: Any) -> None:
        seen.append(collect(config.run_dir.parent)[0]["reason"])
        save(*args)

    monkeypatch.setattr(training, "save", watched)
    assert train(config)["status"] == "done"
    assert seen == ["training is running or was stopped after 1 steps; the same command goes on from the last checkpoint"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save({"state": {}}, folder / "optimizer.pt")
        write_json(folder / "trainer_state.json", {})
    (tmp_path / "checkpoint-15" / "optimizer.pt").write_bytes(b"PK torn")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_st')
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-5"
    shown = capsys.readouterr().out
    assert "checkpoint-15 is damaged (optimizer.pt: " in shown
    assert "checkpoint-10 is damaged (trainer_state.json: JSONDecodeError)" in shown


def test_tensorboard_files_lie_beside_the_run(ready: Make) -> None:
    config = ready("--method", "lora", "--limit-train", "16", "--report-to", "tensorboard")
    train(config)
    assert list((config.run_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_a_tracker_that_is_not_installed_is_an_error(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="--report-to wandb needs a package that is not installed"):
        tracker(ready("--report-to", "wandb"), Path("x"))


def test_a_run_whose_gate_failed_is_not_ranked(ready: Make) -> None:
    config = ready("--method", "lora")
    folder = config.run_dir
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.identity())
    gate = {"loss_fell": {"passed": False, "detail": "mean loss 1.000 -> 1.200"}}
    write_json(folder / "train.json", {"status": "done", "gates": gate})
    (folder / "eval.json").write_text(json.dumps({"all": {}, "per_source": {}, "gates": {}}))
    row = collect(folder.parent)[0]
    assert (row["ranked"], row["reason"]) == (False, "not ranked; loss fell: mean loss 1.000 -> 1.200")

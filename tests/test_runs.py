"""Result files, the run directory, phases and the row order of training."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from kit import files, runs
from kit.checkpoints import last_checkpoint
from kit.cli import explained
from kit.config import RunConfig
from kit.device import Gpu, choose_precision, choose_recipe
from kit.errors import UserError
from kit.files import read_json, read_jsonl
from kit.hub import BUILTIN, state
from kit.progress import TrainingProgress
from kit.resources import Phases, energy
from kit.runs import open_run
from kit.trainer import Order

Make = Callable[..., RunConfig]


def test_how_a_run_is_evaluated_may_change_until_it_is(tiny: Callable[..., RunConfig]) -> None:
    trained = tiny("--method", "lora", "--max-new-tokens", "64")
    folder = open_run(trained)
    (folder / "adapter").mkdir()
    assert read_json(open_run(tiny("--method", "lora", "--max-new-tokens", "32", "--limit-test", "9")) / "config.json")["max_new_tokens"] == 32
    with pytest.raises(UserError, match="rank 16 -> 4"):
        open_run(tiny("--method", "lora", "--max-new-tokens", "32", "--limit-test", "9", "--rank", "4"))
    (folder / "predictions.jsonl").touch()
    with pytest.raises(UserError, match="max_new_tokens 32 -> 64"):
        open_run(tiny("--method", "lora", "--limit-test", "9"))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        files.write_json(path, {"new": 2})
    assert error.value.filename == str(path)
    assert files.read_json(path) == {"old": 1}


def test_nan_never_reaches_a_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "a.json", {"score": float("nan")})


def test_a_full_disk_is_one_line() -> None:
    code = "import errno; from kit.cli import run\ndef main(): raise OSError(errno.ENOSPC, 'No space left on device', 'runs/x')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: runs/x: No space left on device; what was there before is unchanged\n")
    code = "from kit.cli import run\ndef main(): raise RuntimeError('SafetensorError: No space left on device (os error 28)')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full, or writing failed: SafetensorError: No space left on device (os error 28); the same command")


@pytest.mark.parametrize("raised", ["MemoryError()", "OSError(errno.ENOMEM, 'Cannot allocate memory')"])
def test_memory_that_runs_out_is_one_line(raised: str) -> None:
    code = f"import errno; from kit.cli import run\ndef main(): raise {raised}\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: out of memory (")


def test_a_package_that_is_missing_is_one_line() -> None:
    code = "from kit.cli import run\ndef main(): raise ImportError('You need to install `lomo_optim`')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: You need to install `lomo_optim`\n")


@pytest.mark.parametrize("said", ["cannot import name 'install' from 'kit.dora'", "x.so: failed to map segment from shared object"])
def test_what_is_no_ones_to_mend_in_a_line_keeps_its_traceback(said: str) -> None:
    """The second is a folder from which nothing may be run as often as a want of memory."""
    assert explained(ImportError(said)) is None


def test_a_run_keeps_its_settings(tiny: Make) -> None:
    folder = runs.open_run(tiny("--rank", "4"))
    (folder / "adapter").mkdir()
    assert runs.open_run(tiny("--rank", "4")) == folder
    with pytest.raises(UserError, match=r"made with other settings \(alpha 16 -> 2, rank 4 -> 8\)"):
        runs.open_run(tiny("--rank", "8", "--alpha", "2"))
    assert runs.load_config(folder, {}).rank == 4


def test_a_run_from_before_a_setting_existed_has_its_default(tiny: Make) -> None:
    folder = runs.open_run(tiny("--method", "lora"))
    (folder / "adapter").mkdir()
    stored = read_json(folder / "config.json")
    files.write_json(folder / "config.json", {k: v for k, v in stored.items() if k != "rslora"})
    assert runs.open_run(tiny("--method", "lora")) == folder
    with pytest.raises(UserError, match=r"made with other settings \(rslora False -> True\)"):
        runs.open_run(tiny("--method", "lora", "--rslora"))


def test_a_run_that_failed_before_its_first_result_takes_new_settings(tiny: Make) -> None:
    runs.open_run(tiny("--rank", "4"))
    assert runs.load_config(runs.open_run(tiny("--rank", "8")), {}).rank == 8


def test_what_a_kill_left_half_written_goes(tiny: Make) -> None:
    folder = open_run(tiny("--method", "lora"))
    kept, left = folder / ".v1.5rc", (folder / ".eval.json.4711", folder / "adapter" / ".README.md.4711")
    for path in (kept, *left):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    open_run(tiny("--method", "lora"))
    assert (kept.exists(), *(path.exists() for path in left)) == (True, False, False)


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    for step, complete in ((5, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-20"
    assert last_checkpoint(tmp_path / "none") is None


def test_provenance_names_versions_and_hardware(tiny: Make) -> None:
    made = runs.provenance(tiny(), "hash")
    assert made["versions"]["unsloth"] == "2026.10.9"
    assert made["data"] == "hash"
    assert made["gpu"] is None
    assert made["gpu_absent_because"]


def test_a_model_folder_that_changes_in_place_is_another_model(tiny: Make, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(BUILTIN["builtin"], folder)
    config = tiny("--model", str(folder))
    before, again = (runs.provenance(config, "hash")["model_revision"] for _ in range(2))
    with (folder / "model.safetensors").open("r+b") as file:  # as training it further would change every page
        content = bytearray(file.read())
        content[-len(content) // 2 :] = bytes(b ^ 1 for b in content[-len(content) // 2 :])
        file.seek(0)
        file.write(content)
    assert before == again
    assert len(before) == 64
    assert runs.provenance(config, "hash")["model_revision"] != before
    assert runs.provenance(tiny(), "hash")["model_revision"] is None


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN["builtin"], tmp_path / "own"))


def test_what_lies_beside_a_model_and_is_no_file_is_not_read(own: Path) -> None:
    """Else a training would be lost at its last line: this is read after it."""
    before = state(own)
    (own / "old.json").mkdir()
    (own / "gone.txt").symlink_to(own / "nowhere")
    assert state(own) == before


def test_a_file_of_a_model_folder_may_have_any_name(own: Path) -> None:
    before = state(own)
    (own / os.fsdecode(b"caf\xe9.txt")).write_text("not UTF-8")
    assert state(own) != before


def test_a_model_folder_is_the_same_by_links(own: Path, tmp_path: Path) -> None:
    """As the hub's cache has it."""
    links = tmp_path / "links"
    links.mkdir()
    for path in own.iterdir():
        (links / path.name).symlink_to(path)
    assert state(links) == state(own)


@pytest.mark.parametrize("part", [0, 77, 255])
def test_a_change_of_a_few_layers_is_another_model(tmp_path: Path, part: int) -> None:
    """As an adapter of the attention alone makes it that is merged: gemma-3-1b's values are a hundredth of it, in 26 places."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(2**23))
    before = state(tmp_path)
    with weights.open("r+b") as file:
        file.seek(2**15 * part)
        file.write(b"x" * 2**15)
    assert state(tmp_path) != before


def test_a_model_of_the_hub_that_the_cache_lost_has_no_revision(tiny: Make) -> None:
    """Its run is trained by then."""
    assert runs.provenance(tiny("--model", "nobody/nothing"), "hash")["model_revision"] is None


def test_the_peak_of_one_phase_does_not_leak_into_the_next() -> None:
    phases = Phases()
    with phases("large"):
        block = bytearray(300 * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        del block
    with phases("small"):
        pass
    large, small = phases.record["large"], phases.record["small"]
    if not small["process_peak_is_apart"]:
        pytest.skip("this kernel does not let a process reset its peak memory (/proc/self/clear_refs)")
    assert float(large["peak_process_gib"] or 0) - float(small["peak_process_gib"] or 0) > 0.25


@pytest.mark.parametrize(
    ("capability", "family", "whole", "expected"),
    [((8, 0), "gemma3_text", False, "bfloat16"), ((8, 0), "gemma3_text", True, "bfloat16"), ((7, 5), "gemma3_text", False, "float16"),
     ((7, 5), "gpt_neo", False, "float16"), ((7, 5), "gemma3_text", True, "float32")],
)  # fmt: skip
def test_precision_follows_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], family: str, whole: bool, expected: str
) -> None:
    monkeypatch.setattr("kit.device.cuda_gpu", lambda: (Gpu("a GPU", capability), ""))
    chosen = choose_precision(family, whole=whole)
    assert chosen.name == expected
    assert "a GPU" in chosen.reason


def test_energy_is_priced() -> None:
    assert energy(3.6e6, 0.30) == {"joules": 3.6e6, "wh": 1000.0, "cost": 0.30, "price_per_kwh": 0.30}
    assert energy(3.6e6, None) == {"joules": 3.6e6, "wh": 1000.0, "cost": None, "price_per_kwh": None}
    assert energy(None, 0.30) is None


def steps(progress: TrainingProgress, numbers: range) -> None:
    """Steps of 10 tokens each as the trainer would report them, from the start of a process."""
    control, args, state = SimpleNamespace(), SimpleNamespace(device="cpu"), SimpleNamespace(max_steps=20, global_step=numbers[0] - 1, seen=(0, 0))
    progress.on_train_begin(args, state, control)
    for done, number in enumerate(numbers, 1):
        progress.on_step_begin(args, state, control)
        state.global_step, state.seen = number, (10 * done, 4 * done)
        progress.on_step_end(args, state, control)
        progress.on_log(args, state, control, {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0})
        assert not any(Path(f"/proc/self/fd/{fd}").resolve().name == "log.jsonl" for fd in os.listdir("/proc/self/fd"))  # for a kill of the whole machine
    progress.on_train_end(args, state, control)


def test_what_was_used_before_a_kill_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time, tokens, energy and peak memory of all steps that are kept; each process's first step is no timed one."""
    meter, seconds, peaks = itertools.count(1000, 5), itertools.count(), iter([3.0] * 40)
    monkeypatch.setattr("kit.progress.joules", lambda: float(next(meter)))
    monkeypatch.setattr("kit.progress.clock", lambda: float(next(seconds)))
    monkeypatch.setattr("kit.progress.device_gib", lambda: (next(peaks), 3.0))
    log = tmp_path / "log.jsonl"
    steps(TrainingProgress(log, Phases(), 0), range(1, 9))  # killed after step 8; the checkpoint is that of step 6
    monkeypatch.setattr("kit.progress.device_gib", lambda: (1.0, 1.0))
    second = TrainingProgress(log, Phases(), 6)
    assert second.tokens_per_s() == 10.0  # five timed steps of a second each
    steps(second, range(7, 10))
    assert [r["step"] for r in read_jsonl(log)] == list(range(1, 10))
    # 6 and 3 steps of 5 J; the first step of each process is not timed.
    assert second.totals() == {"steps": 9, "train_wall_s": 7.0, "tokens_total": 90, "tokens_supervised": 36, "tokens_per_s": 10.0,
                               "supervised_per_s": 4.0, "peak_memory_gib": 3.0}  # fmt: skip
    assert second.rows[-1]["energy_j"] == 45.0
    part = TrainingProgress(log, Phases(), 0, earlier_steps=9)  # as the second half of a hybrid
    steps(part, range(1, 3))
    assert [r["step"] for r in read_jsonl(log)] == list(range(1, 12))
    assert part.totals()["tokens_total"] == 110


def test_every_process_of_a_training_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    steps(TrainingProgress(log, Phases(), 0), range(1, 4))
    written = log.read_bytes()
    monkeypatch.setenv("RANK", "1")
    second = TrainingProgress(log, Phases(), 3)
    steps(second, range(4, 6))
    assert second.totals()["tokens_total"] == 50
    assert log.read_bytes() == written


def test_without_a_gpu_the_choices_say_why() -> None:
    assert choose_recipe() == ("tiny", "UNSLOTH_FORCE_CPU=1: the built-in model and data, on the CPU")
    assert choose_precision("gemma3_text").name == "float32"


@pytest.mark.parametrize("rows", [1, 8, 100, 803])
def test_the_row_order_is_random_whole_batches_with_the_longest_first(rows: int) -> None:
    lengths = [(i * 7919) % 97 + 1 for i in range(rows)]
    order = Order(lengths, 8, seed=3)
    first = list(order)
    assert len(order) == len(first) == len(set(first)) == (rows - rows % 8 or rows)
    assert set(first) <= set(range(rows))
    assert first == list(Order(lengths, 8, seed=3))
    if rows > 8:
        assert max(lengths[i] for i in first) == max(lengths[i] for i in first[:8])
        order.set_epoch(1)
        assert list(order) != first
        assert (set(order) == set(first)) == (rows % 8 == 0)  # others are left out
        assert list(Order(lengths, 8, seed=4)) != first


@pytest.mark.parametrize(("rows", "earlier"), [(8, 1), (5, 3), (100, 5), (100, 12), (803, 150)])
def test_a_second_part_goes_on_with_the_next_whole_batch(rows: int, earlier: int) -> None:
    """Also where rows are no multiple of the effective batch: the same batches as in one part."""
    lengths = [(i * 7919) % 97 + 1 for i in range(rows)]

    def stream(order: Order) -> list[int]:
        made = []
        for epoch in range(4):
            order.set_epoch(epoch)
            made += list(order)
        return made

    whole, second = stream(Order(lengths, 8, seed=3)), stream(Order(lengths, 8, seed=3, skip=earlier))
    after = earlier * min(8, rows)
    assert second[: len(whole) - after] == whole[after:]


def test_rows_at_the_maximum_length_are_not_all_first() -> None:
    """Cut rows are as long as the maximum: a sixth of all may be."""
    lengths = [256 if i % 6 == 0 else 100 for i in range(2400)]
    order = list(Order(lengths, 8, seed=0))
    assert lengths[order[0]] == 256
    last = sum(lengths[i] == 256 for i in order[1600:])
    assert 100 < last < 170


def test_effective_batches_are_random_and_sorted_inside() -> None:
    """Batches of like length would weigh short rows more; sorted inside, micro-batches of 2 still have less padding."""
    lengths = [(i * 7919) % 500 + 1 for i in range(800)]
    order, blind = list(Order(lengths, 8, seed=0)), list(Order([1] * 800, 8, seed=0))
    assert {frozenset(order[i : i + 8]) for i in range(0, 800, 8)} == {frozenset(blind[i : i + 8]) for i in range(0, 800, 8)}

    def padded(rows: list[int]) -> int:
        return sum(2 * max(lengths[i] for i in rows[start : start + 2]) for start in range(0, 800, 2))

    assert padded(order) < 1.2 * sum(lengths) < padded(blind)
    tops = [max(lengths[i] for i in order[start : start + 8]) for start in range(8, 800, 8)]
    falls = sum(a > b for a, b in itertools.pairwise(tops))
    assert 30 < falls < 70  # neither sorted up nor down: the batches are shuffled


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n' + '{"a":' * 50_000 + "\n")
    with pytest.raises(UserError, match=r"log.jsonl, line 2: not valid JSON"):
        list(read_jsonl(tmp_path / "log.jsonl"))


def test_the_time_left_goes_by_what_this_process_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After 9 of 10 parts before an interruption hours were left, and the first line of the next process said seconds."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr("kit.progress.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    steps(TrainingProgress(tmp_path / "log.jsonl", Phases(), 0), range(1, 17))
    capsys.readouterr()
    steps(TrainingProgress(tmp_path / "log.jsonl", Phases(), 16), range(17, 19))
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()] == ["30 s left", "20 s left"]

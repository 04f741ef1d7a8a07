"""lm-evaluation-harness on a run's saved model: a task in a local YAML with local data, offline; and what is said where it cannot run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import tasks
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json

TASK = """
task: home
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{{{name}}}} is"
doc_to_choice: [" by the river.", " zzz zzz"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""


def test_where_it_is_not_installed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^--tasks needs lm-evaluation-harness, which is not installed; run: python -m pip install lm-eval==\S+$"):
        tasks.check("hellaswag", None, None)


def test_scores_are_named_by_metric_and_filter_and_never_nan() -> None:
    made = {"name": "gsm", "alias": "gsm", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1.0, "em_stderr,strict": "N/A",
            "f1,none": float("nan")}  # fmt: skip
    assert tasks.scores(made) == {
        "acc": {"value": 0.5, "stderr": 0.1}, "em (strict)": {"value": 1.0, "stderr": None}, "f1": {"value": None, "stderr": None},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra: harness)")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_a_local_task_on_the_tiny_model(tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "home.jsonl"
    data.write_text("".join(json.dumps({"name": n, "label": label}) + "\n" for n, label in [("heron", 0), ("otter", 0), ("fox", 1)]), encoding="utf-8")
    (tmp_path / "home.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    with pytest.raises(UserError, match=r"^unknown task 'hone'; did you mean"):
        tasks.check("hone", str(tmp_path), None)
    with pytest.raises(UserError, match="--tasks-path: no such folder"):
        tasks.check("home", str(tmp_path / "x"), None)
    base = tiny("--method", "base")
    for limit, right in ((None, 2 / 3), (2, 1.0)):
        tasks.run(base, tasks.check("home", str(tmp_path), limit), str(tmp_path), limit)
        record = read_json(base.run_dir / "tasks.json")
        assert record["tasks"]["home"]["acc"]["value"] == pytest.approx(right)
        assert (record["limit"], record["versions"]["home"], record["chat_template"]) == (limit, "3", True)
        assert record["versions"]["lm_eval"]

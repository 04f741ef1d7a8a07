"""Configuration: precedence, suggestions, and every problem reported at once."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import config

from kit.config import DATA_FIELDS, PLACES, TRAINING_FIELDS, RunConfig, fields, load_recipe, recipes
from kit.errors import UserError, unknown
from kit.files import write_json
from kit.methods import METHODS
from kit.settings import INDIFFERENT, resolve, sibling


def test_every_field_is_a_flag_with_help() -> None:
    found = fields()
    assert len(found) == len(dataclasses.fields(RunConfig)) - 1 > 30  # all but `asked`
    assert all(f.help for f in found.values())


def test_field_lists_name_real_fields() -> None:
    assert {*DATA_FIELDS, *TRAINING_FIELDS, *PLACES, *INDIFFERENT} <= fields().keys()


def test_a_text_on_the_hub_needs_the_network_and_makes_no_other_run() -> None:
    assert config().is_local
    assert config("--forgetting-text", "none").is_local
    assert not config("--forgetting-text", "wikitext").is_local
    assert config("--forgetting-text", "wikitext", "--score-tokens", "zh").identity() == config().identity()
    assert not config("--model", "org/model").is_local
    assert not config("--source", "alpaca=org/data").is_local


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_resolve_for_every_method(name: str) -> None:
    for method in METHODS:
        assert resolve({"recipe": name, "method": method}).recipe == name


def test_recipe_overrides_default_and_flag_overrides_recipe() -> None:
    assert config().max_length == 256
    assert RunConfig().max_length == 1024
    # An explicit flag wins even when it equals the dataclass default.
    assert config("--max-length", "1024").max_length == 1024


def test_method_block_stands_between_recipe_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("tiny") | {"methods": {"dora": {"rank": 5}}}
    monkeypatch.setattr("kit.settings.load_recipe", lambda _: recipe)
    assert config("--method", "lora").rank == 16
    assert config("--method", "dora").rank == 5
    assert config("--method", "dora", "--rank", "7").rank == 7


def test_a_methods_own_settings_stand_before_the_recipes_block() -> None:
    assert resolve({"recipe": "t4", "method": "highrank"}).rank == 128
    assert config("--method", "highrank").rank == 48
    assert config("--method", "highrank", "--rank", "16").rank == 16


PUBLISHED = ("t4-lora-dora", "a100-qlora-lora", "qlora-galore", "h100-qlora-highrank", "gptneo-t4")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_up_says_what_it_left_unstated(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe["unstated"]
    assert {p["method"] for p in recipe["published"]} <= METHODS.keys()
    measured = {"bleu4", "rouge_l", "perplexity", "human", "memory_gb", "time_s"}
    assert all({"method"} < p.keys() < {"method", *measured} for p in recipe["published"])


def test_scaling_down_keeps_the_method_set_up() -> None:
    flags = {"recipe": "h100-qlora-highrank", "scale_down": True}
    qlora, high = (resolve(flags | {"method": m}) for m in ("qlora", "highrank"))
    assert (qlora.model, qlora.max_length, qlora.format, qlora.name) == ("builtin", 256, "alpaca", "h100-qlora-highrank-scaled")
    assert qlora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    # alpha / rank is the scale of the update: 16 / 64 and 32 / 128.
    assert (qlora.rank, qlora.alpha, high.rank, high.alpha) == (24, 6, 48, 12)
    # 32 / √128, rank-stabilised, by the method and by a flag.
    stable = [resolve(flags | more) for more in ({"method": "rslora"}, {"method": "highrank", "rslora": True})]
    assert [(c.rank, c.alpha) for c in stable] == [(48, 20), (48, 20)]
    assert resolve({"recipe": "gptneo-t4", "scale_down": True}).model == "builtin-gptneo"
    assert resolve(flags | {"rank": 8}).rank == 8


def test_the_tuned_rate_comes_from_the_sweep(tmp_path) -> None:
    flags = ("--method", "lora", "--tuned", "--runs-dir", str(tmp_path))
    with pytest.raises(UserError, match=r"--tuned needs .*lora.json; make it with: python scripts/sweep.py --method lora"):
        config(*flags)
    path = tmp_path / "tiny" / "sweep" / "lora.json"
    write_json(path, {"best": 5e-4, "budget": {"settings": config("--method", "lora").identity()}})
    assert config(*flags).learning_rate == 5e-4
    assert config(*flags, "--learning-rate", "1e-3").learning_rate == 1e-3
    with pytest.raises(UserError, match=r"--tuned needs .*qlora.json"):  # its part has a rate of its own
        config("--method", "hybrid", *flags[2:])
    for damaged in ({"best": 5e-4}, {"best": "x", "budget": {"settings": {}}}, {"best": 5e-4, "budget": []}):
        write_json(path, damaged)
        with pytest.raises(UserError, match=r"lora.json: cannot be read"):
            config(*flags)


def test_what_cannot_train_whole_weights_is_refused_together() -> None:
    with pytest.raises(UserError) as error:
        config("--method", "full", "--precision", "float16", "--dropout", "0.1")
    assert len(error.value.problems) == 2


def test_own_sources_drop_the_recipes_row_counts() -> None:
    assert config().train_per_source == 600
    assert config("--source", "alpaca=x.json").train_per_source == 5000


def test_the_order_of_sources_does_not_matter() -> None:
    assert config("--source", "tulu=a", "--source", "alpaca=b") == config("--source", "alpaca=b", "--source", "tulu=a")


def test_limit_sets_both_limits_and_the_single_ones_win() -> None:
    assert (config("--limit", "5").limit_train, config("--limit", "5").limit_test) == (5, 5)
    assert config("--limit", "5", "--limit-test", "3").limit_test == 3


def test_valid_is_short_for_valid_per_source() -> None:
    assert config("--valid", "7").valid_per_source == config("--valid-per-source", "7").valid_per_source == 7


def test_recipe_keys_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text("model: builtin\nlerning_rate: 1\nmethods: {qlroa: {rank: 1}, lora: {ranc: 1}}\n")
    monkeypatch.setattr("kit.config.RECIPES", tmp_path)
    with pytest.raises(UserError) as error:
        load_recipe("bad")
    assert error.value.problems == (
        "recipe bad: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        "recipe bad: unknown method 'qlroa'; did you mean 'qlora'?",
        "recipe bad, lora: unknown key 'ranc'; did you mean 'rank'?",
    )


def test_all_problems_are_collected() -> None:
    with pytest.raises(UserError) as error:
        config("--rank", "0", "--dropout", "1.5", "--format", "chatt", "--name", "../up")
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("flag", "wrong", "right"),
    [("--dropout", "1", "0.9"), ("--warmup-ratio", "-0.1", "0"), ("--seed", str(2**32), str(2**32 - 1)), ("--learning-rate", "inf", "1"),
     ("--max-length", "31", "32"), ("--valid-per-source", "-1", "0"), ("--max-steps", "0", "1")],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused(flag: str, wrong: str, right: str) -> None:
    config(flag, right)
    with pytest.raises(UserError, match=f"{flag} must "):
        config(flag, wrong)


def test_combined_needs_validation_rows() -> None:
    with pytest.raises(UserError, match="combined chooses its weights on validation rows"):
        config("--method", "combined", "--valid", "0")


def test_another_method_keeps_what_was_asked_for_even_where_that_is_the_default() -> None:
    assert sibling(config("--method", "highrank"), "lora").rank == 16
    assert sibling(config("--method", "highrank", "--rank", "48"), "lora").rank == 48


def test_unknown_lists_what_there_is_when_nothing_is_close() -> None:
    assert unknown("method", "zzz", ["lora", "dora"]) == "unknown method 'zzz'; known: dora, lora"


def test_base_does_not_depend_on_training_settings() -> None:
    assert config("--method", "base", "--rank", "3").identity() == config("--method", "base").identity()
    assert config("--method", "lora", "--rank", "3").identity() != config("--method", "lora").identity()

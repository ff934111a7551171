"""Default settings of post-training stages that follow from the data."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.setup import data_defaults as stage_defaults
from megatron_sov.commands.train.setup.data_defaults import complete_stage, count_epoch_samples
from megatron_sov.model.config import PhaseConfig, RunConfig, apply_settings
from megatron_sov.model.config.run import add_rounds
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.model.recipes.stage_defaults import DEFAULTS, Stage, build_base_config, find_stage_defaults
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.sources import open_sources

MODEL = dataclasses.replace(recipes.get("tiny-qwen3").model, vocab_size=368, max_position_tokens=512)


def build_request(paths: list[Path], *settings: str, stage: Stage = "sft", recipe: str = "") -> RecipeRequest:
    base = recipes.get(recipe) if recipe else build_base_config("mine", MODEL, "fp32", stage)
    base = apply_settings(base, ["model.vocab_size=368", f"objective.name={stage}"])
    data = dataclasses.replace(base.data, paths=dict.fromkeys(map(str, paths), 1.0))
    base = dataclasses.replace(base, data=data)
    return RecipeRequest(base, settings, from_file=False, is_model_only=not recipe)


def complete_config(request: RecipeRequest, stage: Stage = "sft", **facts: Any) -> tuple[RunConfig, str]:
    result = complete_stage(request, request.config(), stage, None, **facts)
    return result.config, ", ".join(result.notes)


def test_a_stage_without_a_recipe_follows_from_data_and_table(packed_data: Any) -> None:
    config, notes = complete_config(build_request([packed_data.chats]))
    samples = count_epoch_samples(config, open_sources(config.data.paths, 368))
    assert (config.optim.lr, config.optim.schedule, config.optim.min_lr) == (2e-5, "cosine", 0.0)
    assert config.data.phases[0].seq_len == 256
    assert config.train.global_batch_size == max(1, 2 ** int(math.log2(max(1, samples // 16))))
    assert config.num_steps() == math.ceil(3 * samples / config.train.global_batch_size)
    assert notes.startswith(f"learning rate 2e-05 (default of sft), 3 epochs = {config.num_steps()} steps, ")
    assert config.problems() == []


def test_user_settings_override_the_table(packed_data: Any) -> None:
    config, notes = complete_config(build_request(
        [packed_data.chats], "optim.lr=1e-3", "train.steps=7", "train.global_batch_size=4",
        'data.phases=[{"name": "main", "seq_len": 128}]', "optim.schedule=constant", "optim.warmup_steps=2"))
    assert (config.optim.lr, config.num_steps(), config.train.global_batch_size) == (1e-3, 7, 4)
    assert (config.data.phases, config.optim.schedule, config.optim.warmup_steps) == (
        (PhaseConfig("main", seq_len=128),), "constant", 2)
    assert config.train.epochs == 0 and notes == "learning rate 0.001, constant schedule"


def test_an_epoch_ends_when_the_order_exhausts_a_source(packed_data: Any) -> None:
    request = build_request([packed_data.chats], "train.epochs=1", "train.global_batch_size=1")
    config, _ = complete_config(request)
    sources = open_sources(config.data.paths, 368)
    order = SampleOrder(config, sources)
    for _ in range(config.num_steps()):
        order.next_batch()
    assert order.count_epochs()[sources[0].name] == pytest.approx(1.0)


@pytest.mark.each(("stage", "settings", "params", "lr"), [
    ("sft", [], 1e9, 2e-5), ("sft", [], 7e10, 2e-6), ("sft", ["lora.rank=8"], 1e9, 2e-4),
    ("preference", [], 1e9, 1e-6), ("preference", [], 8e9, 5e-7),
    ("preference", ["preference.method=orpo"], 1e9, 8e-6), ("policy", [], 1e9, 1e-6)])
def test_rates_depend_on_stage_size_and_method(stage: Stage, settings: list[str], params: float,
                                               lr: float) -> None:
    config = apply_settings(build_base_config("mine", MODEL, "fp32", stage), settings)
    assert find_stage_defaults(config, stage).rate(params, lora=config.lora.on).lr == lr


def test_every_default_has_a_source_and_rates_fall_with_size() -> None:
    for found in DEFAULTS.values():
        assert found.source
        for rates in (found.rates, found.lora):
            assert all(rate.source for rate in rates) and rates[0].from_params == 0
            assert [r.from_params for r in rates] == sorted(r.from_params for r in rates)
            assert [r.lr for r in rates] == sorted((r.lr for r in rates), reverse=True)


def test_epochs_are_a_setting_of_any_recipe(packed_data: Any) -> None:
    request = build_request([packed_data.chats], "train.epochs=2", "train.global_batch_size=2",
                            recipe="tiny-qwen3")
    config, notes = complete_config(request)
    samples = count_epoch_samples(config, open_sources(config.data.paths, 368))
    assert config.num_steps() == math.ceil(2 * samples / 2) and config.optim.lr == 4e-3
    assert notes == f"2 epochs = {config.num_steps()} step{'' if config.num_steps() == 1 else 's'}"
    with pytest.raises(UserError, match=r"train.epochs = 2.0: both"):
        complete_config(build_request([packed_data.chats], "train.epochs=2", "train.steps=3"))


def test_rounds_follow_from_prompts() -> None:
    request = build_request([], stage="policy")
    config, notes = complete_config(request, "policy", num_prompts=40)
    assert (config.rollout.prompts_per_round, config.rollout.rounds) == (40, 3)
    assert (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens) == (256, 256)
    assert config.data.phases[0].seq_len == 512 and config.optim.lr == 1e-6
    assert "3 passes over 40 prompts = 3 rounds of 40" in notes
    for request in (build_request([], "train.steps=9", stage="policy"),
                  dataclasses.replace(build_request([], stage="policy"), changed=frozenset({"train.steps"}))):
        with pytest.raises(UserError, match=r'objective\.name = "policy":'):
            complete_config(request, "policy", num_prompts=40)
    with pytest.raises(UserError, match=r"^train\.epochs = 3\.0"):
        complete_config(build_request([], "rollout.rounds=9", "train.epochs=3", stage="policy"), "policy",
                        num_prompts=40)
    request = build_request([], "rollout.rounds=9", stage="policy")
    config, _ = complete_config(request, "policy", num_prompts=200)
    # no default of so many passes stays in the settings, by which a resumed run would count its rounds
    assert (config.rollout.prompts_per_round, config.rollout.rounds, config.train.epochs) == (64, 9, 0)


LENGTHS = ("rollout.max_prompt_tokens=64", "rollout.max_new_tokens=64", "rollout.rounds=2")


@pytest.mark.each(("settings", "row", "rows", "batch"), [
    ((), 256, 4, 4), (("rollout.samples_per_prompt=2",), 256, 1, 1),
    (("rollout.max_new_tokens=448",), 512, 8, 8),
    (("rollout.max_new_tokens=300",), 512, 6, 6),
    (("data.phases.0.seq_len=128",), 128, 8, 8),
    (("train.micro_batch_size=2",), 256, 2, 2),
    (("train.global_batch_size=6",), 256, 3, 6), (("train.global_batch_size=7",), 256, 1, 7),
    (("policy.method=preference",), 256, 1, 1),
    (("policy.method=preference", "preference.method=grouper"), 256, 4, 4),
    (("policy.share_prompts=false",), 256, 1, 1), (("model.num_mtp_layers=1",), 256, 1, 1)])
def test_rows_of_rounds_follow_from_lengths_and_responses(settings: tuple[str, ...], row: int, rows: int,
                                                          batch: int) -> None:
    """Responses share their prompt, so a micro-batch has room for the longest responses to one prompt."""
    config, notes = complete_config(build_request([], *LENGTHS, *settings, stage="policy"), "policy",
                                    num_prompts=40)
    assert (config.data.phases[0].seq_len, config.train.micro_batch_size) == (row, rows)
    assert config.train.global_batch_size == batch
    assert f"rows of {row} tokens, up to {rows} in a micro-batch" in notes
    assert not [p for p in add_rounds(config).problems() if p.key.startswith(("train.", "data."))]


@pytest.mark.each(("layout", "nproc", "rows", "batch"), [
    ((), 1, 4, 4), ((), 2, 4, 8), ((), 3, 4, 12), (("parallel.tp=2",), 2, 1, 1),
    (("parallel.pp=2",), 2, 1, 1), (("parallel.cp=2",), 2, 1, 1), (("parallel.zero1=true",), 2, 4, 8)])
def test_rows_of_rounds_suit_the_layout(layout: tuple[str, ...], nproc: int, rows: int, batch: int) -> None:
    request = build_request([], *LENGTHS, *layout, stage="policy")
    config = complete_stage(request, request.config(), "policy", nproc, 40).config
    assert (config.data.phases[0].seq_len, config.train.micro_batch_size) == (256, rows)
    assert config.train.global_batch_size == batch and not add_rounds(config).problems(nproc)


def test_rows_of_a_recipe_stay_where_they_hold_a_response() -> None:
    def rows(*settings: str, **facts: Any) -> tuple[int, int, int]:
        request = build_request([], *LENGTHS, *settings, stage="policy", recipe="tiny-qwen3")
        base = apply_settings(request.base, ["data.phases.0.seq_len=192", "train.micro_batch_size=1"])
        request = dataclasses.replace(request, base=base, **facts)
        config, _ = complete_config(request, "policy", num_prompts=40)
        return config.data.phases[0].seq_len, config.train.micro_batch_size, config.train.global_batch_size

    assert recipes.get("tiny-qwen3").train.global_batch_size == 16
    assert rows() == (192, 4, 16), "8 x 128 tokens are 6 rows, of which 4 divide the batch"
    assert rows("rollout.max_new_tokens=300") == (512, 4, 16), "the recipe's rows are too short"
    assert rows("data.phases.0.seq_len=128") == (128, 8, 16)
    assert rows("data.phases.0.seq_len=128", "train.micro_batch_size=2") == (128, 2, 16)
    assert rows(layered=frozenset({"data.phases", "train.micro_batch_size"})) == (192, 1, 16)
    assert rows(from_file=True) == (192, 1, 16), "a run's config.json says everything"


def test_config_files_override_derived_defaults() -> None:
    """Keys in --config count like those in --set."""
    base = apply_settings(build_base_config("mine", MODEL, "fp32", "policy"), [
        "objective.name=policy", "optim.lr=3e-4", "data.phases.0.seq_len=384", "train.micro_batch_size=2",
        *LENGTHS])
    recipe_request = RecipeRequest(base, (), from_file=False, is_model_only=True, layered=frozenset(
        {"optim.lr", "data.phases", "train.micro_batch_size", "rollout.rounds"}))
    config, _ = complete_config(recipe_request, "policy", num_prompts=40)
    assert (config.optim.lr, config.data.phases[0].seq_len, config.train.micro_batch_size) == (3e-4, 384, 2)


@pytest.mark.each(("hidden", "layers", "adapter"), [
    (64, 2, []), (576, 30, []), (576, 30, ["lora.rank=8"]), (2048, 24, []), (4096, 36, []),
    (4096, 36, ["lora.rank=8"]), (5120, 64, [])])
def test_activations_of_a_micro_batch_stay_below_a_bound(hidden: int, layers: int,
                                                         adapter: list[str]) -> None:
    model = dataclasses.replace(MODEL, hidden_size=hidden, num_layers=layers, dense_ffn_dim=3 * hidden,
                                max_position_tokens=32768)
    base = apply_settings(build_base_config("mine", model, "fp32", "policy"),
                          ["objective.name=policy", *adapter])
    recipe_request = RecipeRequest(base, ("rollout.max_prompt_tokens=100", "rollout.max_new_tokens=156",
                                          "rollout.samples_per_prompt=64"), from_file=False,
                                   is_model_only=True)
    config, _ = complete_config(recipe_request, "policy", num_prompts=9)

    def activations(rows: int) -> tuple[int, int]:
        account = build_account(dataclasses.replace(config, train=dataclasses.replace(
            config.train, micro_batch_size=rows, global_batch_size=rows)), 1, 0, 256)
        return account.layer_inputs + max(account.one_layer, account.head), max(2 << 30, account.states)

    rows = config.train.micro_batch_size
    most, bound = activations(rows)
    assert rows == 1 or most <= bound
    facts, bound = activations(rows + 1)
    assert rows == stage_defaults.MAX_SEQ_LEN // 256 or facts > bound

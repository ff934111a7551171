"""Runs that do not fit their data, GPUs or time limit are refused until the user decides."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.setup import feasibility
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.feasibility import (
    count_epochs, least_hours, refuse_recipe_rate, refuse_unfit)
from megatron_sov.model.config import apply_settings
from megatron_sov.model.config.run import add_rounds
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.model.recipes.stage_defaults import Stage
from megatron_sov.plan.footprint import gpu_capacity
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.train.data.sources import open_sources
from tests.commands.train.setup.test_data_defaults import build_request, complete_config


def get_refusal(request: RecipeRequest, stage: Stage = "sft", *, dry_run: bool = False) -> str:
    config, _ = complete_config(request, stage)
    with pytest.raises(UserError) as e:
        refuse_recipe_rate(request, config, stage)
        refuse_unfit(request, config, stage, None, is_initial=False, dry_run=dry_run)
    return str(e.value)


def check_intended_run(request: RecipeRequest, stage: Stage = "sft") -> None:
    config, _ = complete_config(request, stage)
    refuse_recipe_rate(request, config, stage)
    refuse_unfit(request, config, stage, None, is_initial=False, dry_run=False)


def test_a_pretraining_learning_rate_is_refused_unless_set(packed_data: Any) -> None:
    data = [packed_data.chats]
    assert get_refusal(build_request(data, "train.steps=2", recipe="tiny-qwen3")) == (
        "optim.lr = 0.004: is the pretraining rate of recipe tiny-qwen3, and sft takes 2e-05; leave RECIPE "
        "out to train by the defaults of sft, or set the rate that you want, e.g. --set optim.lr=2e-05")
    refusal = get_refusal(build_request(data, recipe="tiny-qwen3"))
    assert "e.g. --set optim.lr=2e-05 --set train.epochs=3" in refusal
    rounds = build_request([], "rollout.rounds=2", stage="policy", recipe="tiny-qwen3")
    with pytest.raises(UserError, match=r"--set optim\.lr=1e-06$"):  # rounds are a length of the run, too
        refuse_recipe_rate(rounds, rounds.config(), "policy")
    check_intended_run(build_request(data, "train.steps=2", "optim.lr=4e-3", recipe="tiny-qwen3"))
    # a recipe of fine-tuning has its own rate
    check_intended_run(build_request(data, "train.steps=2", recipe="tiny-typhoon-s"))


def test_many_epochs_are_refused_unless_set(packed_data: Any) -> None:
    data = [packed_data.chats]
    of_recipe = build_request(data, "optim.lr=1e-3", recipe="tiny-qwen3")
    assert "epochs, and the limit is 20; set train.epochs, add data, or allow the epochs " \
        "by --set data.max_epochs=" in get_refusal(of_recipe)
    assert "train.steps = 90,000: reads the " in get_refusal(build_request(data, "train.steps=90000"))
    check_intended_run(build_request(data, "train.epochs=30"))
    check_intended_run(build_request(data, "train.steps=900", "data.max_epochs=0"))


def test_runs_of_days_are_refused_unless_set(packed_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "CPU_FLOPS_PER_S", 1.0)
    monkeypatch.setattr(feasibility, "list_visible_gpus", list)
    request = build_request([packed_data.chats])
    config, _ = complete_config(request)
    hours = least_hours(config, 1)
    assert get_refusal(request) == (
        f"train.steps = {config.num_steps():,}: take at least {hours / 24:,.0f} days on this machine, and "
        "train.max_hours = 48; make the run shorter, or allow it by "
        f"--set train.max_hours={math.ceil(hours)}")
    check_intended_run(build_request([packed_data.chats], f"train.max_hours={math.ceil(hours)}"))
    # a dry run may be for another machine
    refuse_unfit(request, config, "sft", None, is_initial=False, dry_run=True)


def build_pretraining_request(paths: list[Path], *settings: str, recipe: str = "tiny-qwen3",
                              **changes: Any) -> RecipeRequest:
    """Return the request of `pretrain RECIPE --data ... --set ...`."""
    base = recipes.get(recipe)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, paths=dict.fromkeys(
        map(str, paths), 1.0)))
    return dataclasses.replace(RecipeRequest(base, settings, from_file=False), **changes)


def get_pretraining_refusal(request: RecipeRequest, *, is_initial: bool = True) -> str:
    """Return the refusal of a pretraining run; "" if it may run."""
    config = complete_stage(request, request.config(), None, None).config
    try:
        refuse_unfit(request, config, None, None, is_initial=is_initial, dry_run=True)
    except UserError as e:
        return str(e)
    return ""


FITS = "model.vocab_size=368"
"""The vocabulary of the tests' tokenizer."""


@pytest.mark.each("settings", [
    ("train.steps=200",), ("train.epochs=30",), ("data.max_epochs=0",),
    ("data.max_epochs=100000",), ('data.phases=[{"name": "main", "seq_len": 64, "tokens": 9000000}]',),
    ("data.phases.0.seq_len=64",)])
def test_a_length_of_the_user_is_consent_to_many_epochs(packed_data: Any, settings: tuple[str, ...]) -> None:
    assert get_pretraining_refusal(build_pretraining_request([packed_data.text], FITS, *settings)) == ""


@pytest.mark.each("length", ["train.steps=900000", "train.tokens=900000000"])
def test_steps_and_tokens_have_one_limit_of_epochs(packed_data: Any, length: str) -> None:
    assert "the limit is 200" in get_pretraining_refusal(build_pretraining_request([packed_data.text], FITS,
                                                                                   length))


def test_the_context_length_of_extend_is_no_consent_to_many_epochs(packed_data: Any) -> None:
    asked = build_pretraining_request([packed_data.text], FITS, "data.phases.0.seq_len=64", command="extend")
    asked = dataclasses.replace(asked, base=apply_settings(asked.base, ["train.steps=90000"]))
    assert "epochs, and the limit is 20; set train.steps, add data" in get_pretraining_refusal(asked)


@pytest.mark.each("settings", [
    (), ("optim.lr=1e-3",), ("train.global_batch_size=64",), ("data.max_epochs=4",), ("data.max_epochs=30",)])
def test_many_epochs_of_a_recipes_own_budget_are_refused(packed_data: Any, settings: tuple[str, ...]) -> None:
    request = build_pretraining_request([packed_data.text], FITS, "train.seed=1", *settings)
    request = dataclasses.replace(request, base=apply_settings(request.base, ["train.steps=90000"]))
    config = complete_stage(request, request.config(), None, None).config
    epochs = count_epochs(config, open_sources(config.data.paths, 368))
    refusal = get_pretraining_refusal(request)
    assert refusal.startswith("train.steps = 90,000: reads the ")
    assert refusal.endswith(f"or allow the epochs by --set data.max_epochs={math.ceil(epochs)}")
    assert get_pretraining_refusal(dataclasses.replace(request, from_file=True)) == ""
    allowed = (*request.settings, f"data.max_epochs={math.ceil(epochs)}")
    assert get_pretraining_refusal(dataclasses.replace(request, settings=allowed)) == ""


def test_epochs_count_the_tokens_of_every_phase(packed_data: Any) -> None:
    phases = ('data.phases=[{"name": "a", "seq_len": 32, "tokens": 64000}, '
              '{"name": "b", "seq_len": 64, "tokens": 32000, "global_batch_size": 4}]')
    config = build_pretraining_request([packed_data.text], FITS, phases, "train.steps=0").config()
    sources = open_sources(config.data.paths, 368)
    tokens = sum(source.num_tokens["train"] for source in sources)
    assert count_epochs(config, sources) == pytest.approx(96_000 / tokens, rel=0.05)


@pytest.mark.each(("rows", "allowed"), [
    (368, True), (369, True), (384, True), (400, True), (512, True), (736, True), (737, False), (1024, False),
    (2048, False), (151_936, False), (262_144, False)])
def test_a_recipe_for_another_tokenizer_is_refused(packed_data: Any, rows: int, allowed: bool) -> None:
    request = build_pretraining_request([packed_data.text], "train.steps=2")
    request = dataclasses.replace(request, base=apply_settings(request.base, [f"model.vocab_size={rows}"]))
    refusal = get_pretraining_refusal(request)
    assert refusal == ("" if allowed else (
        f"{packed_data.text}: its tokenizer has 368 ids, model.vocab_size = {rows:,}: recipe tiny-qwen3 is "
        "for a different tokenizer; pack the data with the recipe's tokenizer, or pass --set "
        "model.vocab_size=368 to train from scratch with this tokenizer"))
    # a checkpoint has the rows that it has; a setting or a whole file is the user's word
    assert get_pretraining_refusal(request, is_initial=False) == ""
    consent = (*request.settings, f"model.vocab_size={rows}")
    assert get_pretraining_refusal(dataclasses.replace(request, settings=consent)) == ""
    assert get_pretraining_refusal(dataclasses.replace(request, from_file=True)) == ""


@pytest.mark.each(("settings", "count"), [
    ((), 1), ((), 2), (("train.precision=bf16",), 1), (("parallel.zero1=true",), 2), (("parallel.pp=2",), 2),
    (("parallel.tp=2",), 2)])
def test_memory_of_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...],
                                          count: int) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), list(settings))
    pp = config.parallel.pp
    needs = sum(build_account(config, count, stage, 256).states for stage in range(pp)) * count // pp
    memory = SimpleNamespace(total=int(needs / gpu_capacity.USABLE_HOST_SHARE) + 2)
    monkeypatch.setattr(gpu_capacity, "list_visible_gpus", list)
    monkeypatch.setattr(gpu_capacity, "DRIVER_FILE", "/dev/none")
    monkeypatch.setattr(gpu_capacity.psutil, "virtual_memory", lambda: memory)
    gpu_capacity.refuse_on_this_machine(config, count)
    memory.total -= 4
    with pytest.raises(UserError, match=rf"^tiny-qwen3 on {count} process(es)? of this machine, which"):
        gpu_capacity.refuse_on_this_machine(config, count)
    with monkeypatch.context() as driver:  # GPUs with unknown memory
        driver.setattr(gpu_capacity, "DRIVER_FILE", "/dev/null")
        gpu_capacity.refuse_on_this_machine(config, count)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    gpu_capacity.refuse_on_this_machine(config, None)


def test_training_refuses_the_even_routing_of_benchmarks() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), ["gpu.force_even_routing=on"])
    request = RecipeRequest(config, (), from_file=False)
    with pytest.raises(UserError, match=r"^gpu\.force_even_routing = on: experts get random tokens"):
        refuse_unfit(request, config, None, None, is_initial=True, dry_run=True)


@pytest.mark.each(("settings", "num_prompts", "is_refused"), [
    ((), 1, True), ((), 2, True), (("optim.lr=1e-6",), 1, True), ((), 100_000, False),
    (("data.max_epochs=0",), 1, False), (("rollout.rounds=500",), 1, False), (("train.epochs=9",), 1, False),
    (("data.max_epochs=1e6",), 1, False)])
def test_few_prompts_are_not_drawn_very_often_unless_set(settings: tuple[str, ...], num_prompts: int,
                                                         is_refused: bool) -> None:
    base = recipes.get("tiny-solar-open-rl")
    base = apply_settings(base, ["rollout.rounds=90"])
    recipe_request = RecipeRequest(base, settings, from_file=False)
    config = add_rounds(recipe_request.config())
    try:
        refuse_unfit(recipe_request, config, "policy", None, is_initial=False, dry_run=True,
                     num_prompts=num_prompts)
        message = ""
    except UserError as e:
        message = str(e)
    assert bool(message) == is_refused
    assert not is_refused or message.startswith(f"rollout.rounds = 90: draw each of {num_prompts:,} prompts ")

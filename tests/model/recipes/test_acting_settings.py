"""Settings without effect are refused in every stage; settings with an effect are accepted."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.settings import SettingsError, SettingsProblem, get_inner_hint, get_setting
from megatron_sov.base.settings.problem import format_setting
from megatron_sov.model.config import RunConfig, apply_settings, setting_names
from megatron_sov.model.config.data import phase_steps, phase_tokens
from megatron_sov.model.recipes.requested import (
    RecipeRequest, TrainingOptions, request_recipe, request_training)
from tests.typed_words import format_set_options, parse_settings

STAGES = {"pretrain": ("tiny-qwen3", "lm", "pretrain"), "experts": ("tiny-solar-open", "lm", "pretrain"),
          "extend": ("tiny-solar-open-extend", "lm", "extend"), "sft": ("tiny-qwen3", "sft", "sft"),
          "prefer": ("tiny-qwen3", "preference", "prefer"), "distill": ("tiny-qwen3", "distill", "distill"),
          "rl": ("tiny-qwen3", "policy", "rl train")}
"""Stage -> recipe, objective, command."""
TEXT = {"data": ["text"], "validation": None}
"""Options of a command line with text data and without --validation."""


def build_request(stage: str, *settings: str) -> RecipeRequest:
    recipe, objective, command = STAGES[stage]
    base = apply_settings(recipes.get(recipe), [f"objective.name={objective}"])
    return RecipeRequest(base, settings, from_file=False, command=command)


def find_refused(request: RecipeRequest, **options: Any) -> list[SettingsProblem]:
    """Return the problems of settings that cannot act."""
    try:
        request.refuse_inert(request.config(), **options)
    except SettingsError as e:
        assert {problem.code for problem in e.problems} == {"inert"}, e
        return list(e.problems)
    return []


def iter_setting_names(cls: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the settings of a class and of its nested classes, and of the first item of each settings
    list."""
    for field in dataclasses.fields(cls):
        inner, key = get_inner_hint(cls, field.name), f"{prefix}{field.name}"
        if get_origin(inner) is tuple:
            item = get_inner_hint(inner, "0")
            if dataclasses.is_dataclass(item):
                inner, key = item, f"{key}.0"
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from iter_setting_names(inner, f"{key}.")
        else:
            yield prefix + field.name


@pytest.mark.tier1_cases(2)
@pytest.mark.essential
@pytest.mark.parametrize("stage", STAGES)
def test_each_setting_is_taken_or_refused_by_its_decider(stage: str) -> None:
    config = build_request(stage).config()
    acting = set()
    for key in {*iter_setting_names()} - {"recipe", "code", "objective.name", "data.phases.0.name"}:
        if get_setting(config, key.rpartition(".")[0]) is None:  # in a group that is off
            continue
        setting = f"{key}={json.dumps(get_setting(config, key), default=dataclasses.asdict)}"
        problems = find_refused(build_request(stage, setting), **TEXT)
        if not problems:
            acting.add(key)
        for problem in problems:
            assert problem.key == key and problem.way_out.startswith("leave it out, ")
            deciders = problem.rule.removeprefix("has no effect with ").partition(": it acts when ")[0]
            for decider in deciders.split(" and "):
                name, _, value = decider.partition(" = ")
                assert "*" in name or value == format_setting(read_decider(config, stage, name))
    acting_in_stage = {"prefer": {"preference.method"}, "distill": {"distillation.beta"},
                       "rl": {"rollout.rounds"},
                       "extend": {"extend.gate.min_accuracy", "model.num_experts_per_token"},
                       "experts": {"model.num_experts_per_token"}}
    assert {"optim.weight_decay", "train.seed", "model.hidden_size", "parallel.tp"} <= acting
    acting_somewhere = {key for keys in acting_in_stage.values() for key in keys}
    assert acting & acting_somewhere == acting_in_stage.get(stage, set())


def read_decider(config: RunConfig, stage: str, name: str) -> Any:
    """Return the value of a setting (as its method fills it in) or option that decides about others."""
    options = {"command": STAGES[stage][2], "--data": ["text"], "--validation": None}
    if name in options:
        return options[name]
    filled_in = get_setting(config, name.replace("policy.", "policy.parts."))
    return get_setting(config, name) if filled_in is None else filled_in


INERT_SETTINGS = [
    ("sft", "lora.alpha=32", "lora.rank = 0"), ("sft", "lora.dora=true", "lora.rank = 0"),
    ("pretrain", "data.over_long=refuse", '--data = ["text"]'),
    ("pretrain", "objective.options.gamma=2", 'objective.name = "lm"'),
    ("pretrain", "optim.warmup_tokens=5", 'optim.schedule_by = "steps"'),
    ("pretrain", "train.fp8=nvfp4 train.fp8_format=e4m3", 'train.fp8 = "nvfp4"'),
    ("pretrain", "train.max_hours=3", 'objective.name = "lm"'),
    ("extend", "train.steps=9", "extend.stages.*.steps = "),
    ("prefer", "preference.method=ipo preference.label_smoothing=0.1", 'preference.method = "ipo"'),
    ("rl", "train.steps=9", 'objective.name = "policy"'),
    ("rl", "policy.method=opd policy.clip_low=0.1", 'policy.clip = "none"'),
    ("rl", "policy.correction=none policy.correction_high=2", 'policy.correction = "none"'),
    ("rl", "policy.geo_reject_low=0.5", "policy.geo_reject_high = null"),
    ("rl", "policy.method=preference policy.kl=k3", 'policy.method = "preference"'),
    ("rl", "rollout.validation_samples=2", "--validation = null"),
    ]
"""(stage, settings, decider): the last setting has no effect because of the decider."""


@pytest.mark.each(("stage", "settings", "decider"), INERT_SETTINGS)
def test_a_setting_that_cannot_act_is_refused(stage: str, settings: str, decider: str) -> None:
    [problem] = find_refused(build_request(stage, *settings.split()), **TEXT)
    assert problem.key == settings.split()[-1].partition("=")[0] and decider in problem.rule


ACTING_SETTINGS = [
    ("prefer", "preference.method=dpo preference.beta=0.1 preference.label_smoothing=0.1"),
    ("sft", "lora.rank=4 lora.alpha=32 lora.dora=true"),
    ("sft", 'lora.rank=4 lora.targets=["q_proj"] train.max_hours=3 train.epochs=2 data.over_long=drop'),
    ("distill", "distillation.top_k=4 distillation.keep_remainder=false distillation.beta=0.5"),
    ("rl", "policy.correction_high=3 policy.correction_low=0.1 policy.geo_reject_high=2 "
     "policy.geo_reject_low=0.1 policy.overlong_buffer_tokens=2 policy.overlong_penalty=0.5"),
    ("rl", "policy.knowledge_coeff=0.1 policy.knowledge_share=0.5 policy.knowledge_batch_size=2"),
    ("rl", "rollout.validation_samples=2 rollout.validation_every_rounds=2 obs.sample_rows=2"),
    ("rl", "policy.method=gkd policy.on_policy_share=0.5 distillation.beta=0.5"),
    ("rl", "policy.method=preference policy.reference=run policy.keep_unfinished=true preference.beta=0.2"),
    ("extend", "extend.gate.min_accuracy=0.5 extend.gate.loss_tolerance_nats=0.1"),
    ("extend", "extend.stages=[] data.phases.0.seq_len=64 train.steps=2"),
    ("experts", "model.router_bias_update_rate=0.1 model.num_shared_experts=2 guards.max_bias_spread=2"),
    ("experts", "model.num_mtp_layers=1 model.mtp_loss_coeff=0.1 model.mtp_depths=2"),
    ("experts", "parallel.expert_dispatcher=deepep gpu.exchange_sms=8 train.fp8=mxfp8 train.fp8_format=e4m3 "
     "train.fp8_pad_routed_tokens=true train.precision=bf16 gpu.grad_dtype=bf16"),
    ("pretrain", "optim.schedule=constant data.phases.0.lr=1e-3 data.phases.0.schedule=cosine "
     "data.phases.0.min_lr=1e-4 optim.min_lr=1e-4"),
    ("pretrain", 'optim.groups=[{"pattern":"*","optimizer":"muon"}] optim.muon_scale=original'),
    ("pretrain", "optim.schedule_by=tokens optim.warmup_steps=0 optim.warmup_tokens=5 data.packing=concat"),
    ("pretrain", "train.average_last=2 train.average_weights=ema train.average_decay=0.9"),
    ("pretrain", 'evaluate.background.tasks=["lm","needle"] evaluate.background.timeout_s=9 needle.samples=3 '
     'evaluate.lm.tasks=["x"] evaluate.lm.options=["--limit=3"]'),
    ("pretrain", 'model.audio_tokens={"first":0,"size":8} objective.audio_weight=0.5'),
    ("pretrain", "train.steps=3 train.tokens=0 train.epochs=0"),
    ]
"""(stage, settings that all have an effect together)."""


@pytest.mark.each(("stage", "settings"), ACTING_SETTINGS)
def test_a_setting_that_acts_is_taken(stage: str, settings: str) -> None:
    formats = ["chat", "text"] if stage == "sft" else ["text"]
    assert find_refused(build_request(stage, *settings.split()), data=formats,
                        validation="prompts.jsonl") == []


def test_own_objectives_may_read_anything(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class Own:\n    def __init__(self, context, *, gamma=1): ...\n"
        "    def collect(self, policy, step): ...\n    def prepare(self, batch): ...\n"
        "    def loss(self, hidden, head, batch): ...\n")
    changes = (f"objective.name={tmp_path}/own.py:Own", "objective.options.gamma=2", "preference.beta=0.5",
               "rollout.temperature=0.5", "policy.kl=k3", "distillation.beta=1", "objective.text_coeff=0.1")
    settings = format_set_options(changes)
    request = request_training(parse_settings(TrainingOptions, ["tiny-qwen3", "--data", "d", *settings]),
                               "lm")
    assert request.config().preference.beta == 0.5


@pytest.mark.each(("changes", "refused_keys"), [
    ({"lora": {"alpha": 32.0}}, "lora.alpha"), ({"lora": {"alpha": 16.0}}, ""),
    ({"lora": {"alpha": 32.0, "rank": 2}}, ""), ({"preference": {"beta": 0.5, "method": "ipo"}},
                                                 "preference.beta preference.method"),
    ({"needle": {"samples": 3}}, "needle.samples"), ({"optim": {"lr": 1e-3}}, ""),
    ({"data": {"phases": [{"name": "main", "seq_len": 64, "min_lr": 0.1}]}}, "data.phases.0.min_lr"),
])
def test_config_files_are_checked_for_inert_changes(changes: dict[str, Any], refused_keys: str,
                                                    tmp_path: Path) -> None:
    partial_file, full_file = tmp_path / "part.json", tmp_path / "whole.json"
    partial_file.write_text(json.dumps({"recipe": "tiny-qwen3", **changes}))
    config = json.loads(format_json(recipes.get("tiny-qwen3").to_dict()))
    for group, values in changes.items():
        config[group] |= values
    full_file.write_text(json.dumps(config))
    for file in (partial_file, full_file):
        request = request_training(parse_settings(TrainingOptions, ["--config", str(file), "--data", "d"]),
                                   "lm")
        problem_keys = [problem.key for problem in find_refused(request)]
        # A complete file may belong to a run, whose command has derived the phases.
        assert problem_keys == ([] if file == full_file and "data" in changes else refused_keys.split())


def test_configs_of_other_runs_and_resumed_runs_are_accepted(tmp_path: Path) -> None:
    rounds = apply_settings(recipes.get("tiny-solar-open-rl"), ["rollout.rounds=3"])
    (tmp_path / "config.json").write_text(format_json(rounds.to_dict()))
    args = parse_settings(TrainingOptions, ["--config", str(tmp_path / "config.json")])
    assert find_refused(request_training(args, "policy", needs_data=False)) == []
    args = parse_settings(TrainingOptions, ["tiny-qwen3", "--data", "d", "--set", "lora.alpha=32"])
    previous = apply_settings(recipes.get("tiny-qwen3"), ["lora.alpha=32"])
    assert find_refused(request_training(args, "lm", resumed=previous)) == []
    args = dataclasses.replace(args, settings=("lora.alpha=8",))
    assert [p.key for p in find_refused(request_training(args, "lm", resumed=previous))] == ["lora.alpha"]


@pytest.mark.each("recipe", [name for name in recipes.names()
                             if recipes.get(name).objective.name != "policy"])
def test_train_tokens_scales_the_phases_of_every_recipe(recipe: str) -> None:
    before = recipes.get(recipe)
    after = apply_settings(before, ["train.tokens=200e9"])
    assert after.train.steps == 0 and after.train.tokens == 200_000_000_000
    tokens_before = phase_tokens(before.data, before.train)
    tokens_after = phase_tokens(after.data, after.train)
    # Phases end with whole steps, in the recipe too.
    one_step = max((p.global_batch_size or after.train.global_batch_size) * p.seq_len
                   for p in after.data.phases)
    assert sum(tokens_after) == pytest.approx(200e9, rel=1e-3, abs=len(tokens_after) * one_step)
    assert tokens_after == pytest.approx([200e9 * tokens / sum(tokens_before) for tokens in tokens_before],
                                         rel=1e-3, abs=2 * one_step)
    used_tokens = [steps * (p.global_batch_size or after.train.global_batch_size) * p.seq_len
                   for steps, p in zip(phase_steps(after.data, after.train), after.data.phases, strict=True)]
    if not after.train.ramp_steps:
        assert sum(used_tokens) == pytest.approx(200e9, rel=2e-2, abs=len(tokens_after) * one_step)
    assert apply_settings(after, ["train.tokens=200000000000"]) == after


@pytest.mark.each(("settings", "message"), [
    ("train.tokens=1e6 train.steps=3", "train.tokens = 1000000 has no effect with train.steps = 3: "),
    ("train.tokens=1e6 data.phases.0.tokens=5", "train.tokens = 1000000 has no effect with data.phases.0."),
    ('train.tokens=1e6 data.phases=[{"name":"a","tokens":7}]', "with data.phases.0.tokens = 7: both say"),
    ("train.steps=3 train.epochs=2", "train.steps = 3 has no effect with train.epochs = 2.0: both say how"),
    ("train.tokens=5 train.epochs=2", "train.tokens = 5 has no effect with train.epochs = 2.0: both"),
    ("train.tokens=0 train.steps=3", ""), ("train.tokens=5 train.steps=0", ""), ("train.tokens=2e5", ""),
    ('train.tokens=1e6 data.phases=[{"name":"a"},{"name":"b","share":3}]', ""), ("train.steps=3", ""),
    ("data.phases.0.tokens=1000000 train.steps=0", ""),
])
def test_two_lengths_of_a_run_are_refused_with_the_winner(settings: str, message: str) -> None:
    request = build_request("pretrain", *settings.split())
    if not message:
        request.config()
        return
    with pytest.raises(SettingsError, match="both say how long") as e:
        request.config()
    assert message in str(e.value) and "set one of them" in str(e.value)


def test_a_budget_of_tokens_needs_no_other_setting() -> None:
    request = request_recipe(parse_settings(TrainingOptions,
                                            ["qwen3-8b", "--data", "d", "--set", "train.tokens=200e9"]))
    assert request.config().num_steps() == round(200e9 / (128 * 4096)) and len(setting_names()) > 300

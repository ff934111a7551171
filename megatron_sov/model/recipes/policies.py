"""Recipes for published reinforcement learning runs, based on the recipe of the model they continue.

Some numbers were not published and are not guessed here: MGPO's lambda and the clip bounds of
VibeThinker-1.5B, and the clip bound of K-EXAONE, must be set for a run.
"""

from dataclasses import replace
from typing import Any

from megatron_sov.model.config import (
    ExtendConfig, GroupConfig, NeedleConfig, ParallelConfig, PhaseConfig, PreferenceConfig, RunConfig)
from megatron_sov.model.recipes.k_exaone import SOURCES as K_EXAONE_SOURCES, k_exaone_236b
from megatron_sov.model.recipes.open_models import (
    TYPHOON_SOURCES, VIBETHINKER_SOURCES, dense_sources, qwen3_4b_2507, typhoon_s_8b, vibethinker_1_5b)
from megatron_sov.model.recipes.solar_open import DPO_SOURCES, solar_open_102b_dpo
from megatron_sov.model.recipes.sources import DEFAULT, Sources, ValueSource, derive_sources, ours, published

TYPHOON, VIBETHINKER = "arXiv 2601.18129", "arXiv 2511.06221"
SOLAR, K_EXAONE = "arXiv 2601.07022", "arXiv 2601.01739"
Values = dict[str, tuple[Any, ValueSource]]
"""Dotted setting -> (value, source)."""


def _run(recipe: str, base: RunConfig, values: Values) -> RunConfig:
    """Return `base` as recipe `recipe` with `values`, and rows long enough for a prompt and response (or a
    pair)."""
    run = base
    for key, (value, _) in values.items():
        room, _, field = key.partition(".")
        run = replace(run, **{room: replace(getattr(run, room), **{field: value})})
    rollout = run.rollout
    rows = PhaseConfig("rounds", seq_len=run.documents_per_unit * (
        rollout.max_prompt_tokens + rollout.max_new_tokens))
    return replace(run, recipe=recipe, data=replace(run.data, phases=(rows,)),
                   train=replace(run.train, steps=rollout.rounds * rollout.steps_per_round))


def _sources(base: Sources, values: Values) -> Sources:
    """Return the sources of the config that `_run` builds from `values`."""
    return derive_sources(base, {
        **{key: source for key, (_, source) in values.items()}, "data.phases.*": DEFAULT,
        "data.phases.*.name": ours("rounds are the phases"),
        "data.phases.*.seq_len": ours("a row holds one or two of the longest prompts and responses"),
        "train.steps": ours("rounds x steps per round"),
        "train.global_batch_size": ours("a step has as many rows as its responses fill; this only has to "
                                        "suit the layout"),
        **dict.fromkeys(("extend.*", "needle.*", "preference.*"), DEFAULT)})


def _steady(lr: float) -> Values:
    """Return the settings of a constant learning rate, without warm-up and weight decay."""
    why = ours("not published: a steady rate")
    return {"optim.schedule": ("constant", why), "optim.min_lr": (lr, why), "optim.warmup_steps": (0, why),
            "optim.weight_decay": (0.0, why)}


def _ink(run: str, response_tokens: int, batch: int, steps: int, epochs: int) -> Values:
    """Return the values of InK-GRPO's single-turn or agentic run."""
    source = published(f"{TYPHOON}, InK-GRPO, {run} run and its released script")
    return {
        "objective.name": ("policy", source), "policy.method": ("ink_grpo", source),
        "policy.aggregation": ("token", source), "policy.clip_low": (0.2, source),
        "policy.clip_high": (0.24, source), "policy.kl": ("none", source),
        "policy.knowledge_coeff": (0.1, source), "policy.knowledge_share": (0.6, source),
        "policy.knowledge_batch_size": (batch, source), "policy.overlong_buffer_tokens": (1024, source),
        "policy.overlong_penalty": (1.0, source), "rollout.prompts_per_round": (32, source),
        "rollout.samples_per_prompt": (8, source), "rollout.steps_per_round": (steps, source),
        "rollout.temperature": (0.7, source), "rollout.max_prompt_tokens": (2048, source),
        "rollout.max_new_tokens": (response_tokens, source),
        "rollout.rounds": (100, ours(f"{epochs} epochs are published; their rounds follow from the prompts")),
        "optim.lr": (1e-6, source), **_steady(1e-6)}


LEGAL = _ink("single-turn", 4096, batch=64, steps=1, epochs=2)
LEGAL_AGENT = _ink("agentic", 8192, batch=16, steps=4, epochs=1)
_QWEN = dense_sources("Qwen/Qwen3-4B-Instruct-2507")
LEGAL_SOURCES, LEGAL_AGENT_SOURCES = _sources(_QWEN, LEGAL), _sources(_QWEN, LEGAL_AGENT)


def _typhoon(recipe: str, values: Values) -> RunConfig:
    return _run(recipe, replace(qwen3_4b_2507(), parallel=ParallelConfig(zero1=True)), values)


def typhoon_s_4b_legal() -> RunConfig:
    """Return InK-GRPO on legal questions with legal texts, single-turn and on-policy, for `rl run`."""
    return _typhoon("typhoon-s-4b-legal", LEGAL)


def typhoon_s_4b_legal_agent() -> RunConfig:
    """Return InK-GRPO with tools that search and read laws, four steps per round, for `rl run`."""
    return _typhoon("typhoon-s-4b-legal-agent", LEGAL_AGENT)


_OPD = published("scb-10x/typhoon-s, on-policy distillation")
OPD: Values = {
    "objective.name": ("policy", _OPD), "policy.method": ("gkd", _OPD),
    "policy.on_policy_share": (0.25, _OPD), "distillation.beta": (0.0, _OPD),
    "distillation.temperature": (1.0, _OPD), "rollout.prompts_per_round": (64, _OPD),
    "rollout.samples_per_prompt": (1, _OPD), "rollout.temperature": (1.0, _OPD),
    "rollout.top_p": (0.95, _OPD),
    "rollout.max_prompt_tokens": (2048, published("scb-10x/typhoon-s: 4,096 in all, 2,048 per response")),
    "rollout.max_new_tokens": (2048, _OPD),
    "rollout.rounds": (2500, published("scb-10x/typhoon-s: 1 epoch over about 160,000 prompts")),
    "optim.lr": (1e-6, _OPD), "optim.schedule": ("cosine", _OPD),
    "optim.warmup_steps": (125, published("scb-10x/typhoon-s: 5 % of the steps")),
    "train.global_batch_size": (64, published("scb-10x/typhoon-s: 64 data samples per step"))}
OPD_SOURCES = derive_sources(_sources(TYPHOON_SOURCES, OPD), {
    "train.global_batch_size": OPD["train.global_batch_size"][1]})


def typhoon_s_8b_opd() -> RunConfig:
    """Return on-policy distillation for `rl run`: a quarter of the rounds use the student's responses, the
    others the data; forward KL to the teacher's whole distribution."""
    return _run("typhoon-s-8b-opd", typhoon_s_8b(), OPD)


def _mgpo(stage: str, response_tokens: int, length: ValueSource) -> Values:
    """Return a stage of VibeThinker's signal phase; lambda, clip bounds, group size, learning rate and batch
    size were not published."""
    source = published(f"{VIBETHINKER}, signal phase: {stage}")
    return {
        "objective.name": ("policy", source), "policy.method": ("mgpo", source),
        "policy.kl": ("none", source), "policy.aggregation": ("sequence", source),
        "rollout.max_new_tokens": (response_tokens, length),
        "rollout.samples_per_prompt": (16, ours("not published: enough to estimate shares of right answers")),
        "rollout.rounds": (100, ours("not published")), "optim.lr": (1e-6, ours("not published")),
        **_steady(1e-6)}


MATH_16K = _mgpo("mathematics at 16K", 16384, published(f"{VIBETHINKER}, training: 16K"))
MATH_32K = _mgpo("mathematics at 32K", 32768, published(f"{VIBETHINKER}, training: 32K"))
CODE = _mgpo("code", 32768, ours("not published: as in the stage before"))
MATH_16K_SOURCES, MATH_32K_SOURCES, CODE_SOURCES = (
    _sources(VIBETHINKER_SOURCES, values) for values in (MATH_16K, MATH_32K, CODE))


def _vibethinker(recipe: str, values: Values) -> RunConfig:
    return _run(recipe, replace(vibethinker_1_5b(), extend=ExtendConfig(), needle=NeedleConfig()), values)


def vibethinker_1_5b_math_16k() -> RunConfig:
    """Return MGPO on mathematics with responses up to 16K, for `rl run`; set policy.mgpo_lambda,
    policy.clip_low and policy.clip_high."""
    return _vibethinker("vibethinker-1.5b-math-16k", MATH_16K)


def vibethinker_1_5b_math_32k() -> RunConfig:
    """Return MGPO on mathematics with responses up to 32K, after the 16K stage."""
    return _vibethinker("vibethinker-1.5b-math-32k", MATH_32K)


def vibethinker_1_5b_code() -> RunConfig:
    """Return MGPO on code, after the 32K stage."""
    return _vibethinker("vibethinker-1.5b-code", CODE)


def _large(source: ValueSource) -> Values:
    """Return the values shared by the runs of Solar Open 102B and K-EXAONE 236B, most of them unpublished."""
    choice = ours("not published")
    return {"objective.name": ("policy", source), "policy.kl": ("none", source),
            "rollout.max_prompt_tokens": (4096, choice), "rollout.max_new_tokens": (28672, choice),
            "rollout.prompts_per_round": (512, choice), "optim.lr": (1e-6, choice), **_steady(1e-6)}


_PHASE_A = published(f"{SOLAR}, SnapPO, phase A")
_GSPO = published("arXiv 2507.18071; Solar's own clip was not seen")
SNAPPO: Values = {
    **_large(_PHASE_A), "policy.method": ("gspo", _PHASE_A), "policy.clip_low": (3e-4, _GSPO),
    "policy.clip_high": (4e-4, _GSPO), "rollout.steps_per_round": (4, _PHASE_A),
    "rollout.samples_per_prompt": (16, published(f"{SOLAR}, SnapPO: 8 to 16")),
    "rollout.rounds": (400, ours("about 200,000 prompts are published"))}
SNAPPO_SOURCES = _sources(DPO_SOURCES, SNAPPO)


def solar_open_102b_rl() -> RunConfig:
    """Return SnapPO's phase A: GSPO on about 200,000 prompts, four steps per round, for `rl run`."""
    return _run("solar-open-102b-rl", replace(solar_open_102b_dpo(), preference=PreferenceConfig()), SNAPPO)


_PHASE_B = published(f"{SOLAR}, SnapPO, phase B: iterative DPO")
_PAIR = ours("not published: a row of 32K holds both responses of a pair")
DPO_ROUNDS: Values = {
    "objective.name": ("policy", _PHASE_B), "policy.method": ("preference", _PHASE_B),
    "policy.reference": ("round", ours("not published: each round may go as far again")),
    "rollout.steps_per_round": (4, ours("as in phase A")),
    "rollout.samples_per_prompt": (16, published(f"{SOLAR}, SnapPO: 8 to 16")),
    "rollout.prompts_per_round": (512, ours("not published")), "rollout.max_prompt_tokens": (2048, _PAIR),
    "rollout.max_new_tokens": (14336, _PAIR), "rollout.rounds": (20, ours("not published")),
    "optim.lr": (5e-7, ours("not published")), **_steady(5e-7)}
DPO_ROUNDS_SOURCES = derive_sources(_sources(DPO_SOURCES, DPO_ROUNDS), {
    key: DPO_SOURCES[key] for key in ("preference.method", "preference.beta")})


def solar_open_102b_dpo_rounds() -> RunConfig:
    """Return SnapPO's phase B on the model's own responses: DPO on the best and worst response per prompt,
    for `rl run`."""
    return _run("solar-open-102b-dpo-rounds", solar_open_102b_dpo(), DPO_ROUNDS)


_AGAPO = published(f"{K_EXAONE}, reinforcement learning: AGAPO")
AGAPO: Values = {
    **_large(_AGAPO), "policy.method": ("agapo", _AGAPO),
    "optim.groups": ((GroupConfig("*router.weight", frozen=True),),
                     published(f"{K_EXAONE}, reinforcement learning: the router stays as it is")),
    "model.router_bias_update_rate": (
        0.0, published(f"{K_EXAONE}, reinforcement learning: the router stays as it is")),
    "optim.name": ("adamw", ours("not published")),
    "train.fp8": ("none", ours("bf16: 8 bits are published for pretraining")),
    "rollout.rounds": (100, ours("not published"))}
AGAPO_SOURCES = derive_sources(_sources(K_EXAONE_SOURCES,
                                        {k: v for k, v in AGAPO.items() if k != "optim.groups"}), {
    "optim.groups.*": AGAPO["optim.groups"][1], "optim.decay_share": DEFAULT})


def k_exaone_236b_rl() -> RunConfig:
    """Return AGAPO with a frozen router, for `rl run`; set policy.clip_high."""
    base = k_exaone_236b()
    # `decay_share` belongs to the base's schedule: back to its default for the constant rate
    return _run("k-exaone-236b-rl", replace(
        base, parallel=replace(base.parallel, pp=4, cp=4),
        optim=replace(base.optim, decay_share=type(base.optim)().decay_share)), AGAPO)

"""What the price of post-training needs beside a recipe's settings: nobody knows it before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig, PhaseConfig, RunConfig
from megatron_sov.model.config.preference import WITH_REFERENCE
from megatron_sov.plan.calibration.fitting import fullest
from megatron_sov.plan.decoding import (
    PACKED_SHARE, DecodingRequest, DecodingRound, Engines, round_of, writing)
from megatron_sov.plan.operation import cost
from megatron_sov.plan.pages.quote import Quote, QuotedMemory
from megatron_sov.plan.pricing import Pricing, RunStage, quote, run_stages
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import ModelShape, Workload, of_model, of_run
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR


@dataclass(frozen=True)
class Assumed:
    """Lengths of documents and responses, and what stands on the command line."""

    document_tokens: int = 1000
    """Fine-tuning: mean tokens of a conversation; attention stays inside of it (Typhoon-S: 340,000 of about
    1,000 each)."""
    response_share: float = 0.5
    """Mean tokens of a response beside the longest that the settings allow."""
    prompt_share: float = 0.25
    """The same of a prompt."""
    student_share: float = 0.25
    """Distillation: share of the samples that the student writes itself (Typhoon-S's lambda)."""
    turns: int = 10
    """Distillation: how often the student writes anew with what it has learned; the paper swaps models in
    every step."""
    teacher: str = ""
    """Recipe of the teacher's model; empty: the one that `TEACHERS` names, or one as large as the student."""
    judge_s: float = 0.1
    """Seconds of a processor core to judge a response by rules or tests."""
    judge_cores: int = 32


TEACHERS = {"typhoon-s-8b-opd": "qwen3-30b-a3b-2507"}
"""Recipe -> that of its teacher's model (arXiv 2601.18129)."""


def teacher_of(config: RunConfig, assumed: Assumed) -> str:
    """Return the recipe of a run's teacher; empty: nobody names one."""
    return assumed.teacher or TEACHERS.get(config.recipe, "")


# What papers said that their post-training took, to stand beside a price.


@dataclass(frozen=True)
class PostTrainingBudget:
    recipes: tuple[str, ...]
    """Recipes of the runs that it was spent on, together."""
    gpu: str
    """Chip, as `clusters.chips` calls it."""
    num_gpus: int
    """GPUs; 0: not said."""
    gpu_hours: float
    """GPU-hours of all of them."""
    cost_usd: float
    """Money that the authors name; 0: none."""
    told: str


BUDGETS = (
    PostTrainingBudget(("typhoon-s-8b", "typhoon-s-8b-opd"), "h100", 8, 8 * 48.0, 0.0,
                       "SFT and on-policy distillation: 8 H100, about 2 days (arXiv 2601.18129)"),
    PostTrainingBudget(("typhoon-s-4b-legal",), "h100", 4, 4 * 24.0, 0.0,
                       "InK-GRPO: 4 H100, about 1 day (arXiv 2601.18129)"),
    PostTrainingBudget(("typhoon-s-4b-legal-agent",), "h100", 4, 4 * 24.0, 0.0,
                       "agentic InK-GRPO: 4 H100, about 1 day (arXiv 2601.18129)"),
    PostTrainingBudget(("vibethinker-1.5b", "vibethinker-1.5b-math-16k", "vibethinker-1.5b-math-32k",
                        "vibethinker-1.5b-code"), "h800", 0, 3900.0, 7800.0,
                       "all post-training: 3,900 H800 hours, 7,800 USD at 2 an hour (arXiv 2511.06221)"),
)
"""Budgets of runs that there are recipes for."""


def told_of(recipe: str) -> tuple[str, ...]:
    """Return what was published of a recipe's price, as sentences."""
    return tuple(f"published of {' + '.join(b.recipes)}: {b.told}" for b in BUDGETS if recipe in b.recipes)


# Quotes of jobs that are no phase of a curriculum: what all of them have in common.


def priced(pricing: Pricing, name: str, kind: str, phase: PhaseConfig, *, steps: int, tokens: int,
           seconds: Mapping[str, float], memory: QuotedMemory, flops_per_token: float = 0.0,
           notes: tuple[str, ...] = (), on_gpus: bool = True) -> Quote:
    """Return the quote of a job."""
    step_s = sum(seconds.values())
    gpus = pricing.num_ranks if on_gpus else 0
    paid = cost(steps * step_s, gpus, pricing.machines.profile)
    rate = tokens / (steps * step_s) / gpus if gpus and step_s else 0.0
    tflops = rate * flops_per_token / 1e12
    return Quote(
        name=name, kind=kind, gpu=pricing.chip.name if on_gpus else "", num_gpus=gpus, tokens=tokens,
        steps=steps, seq_len=phase.seq_len, global_batch_size=phase.global_batch_size, layout={},
        memory=memory, seconds={part: s for part, s in seconds.items() if s}, tokens_per_s_per_gpu=rate,
        tflops_per_gpu=tflops, mfu=tflops * 1e12 / pricing.chip.bf16_flops_per_s,
        hours=steps * step_s / SECONDS_OF_AN_HOUR, effective_share=1.0, energy_kwh=paid.energy_kwh,
        cost_usd=paid.usd, cost_range_usd=(paid.usd_low, paid.usd_high),
        notes=(*notes, *([f"Cost: {paid.price_note}."] if gpus else [])))


# What post-training takes, by its jobs: fine-tuning, distillation, preference, reinforcement learning.


MAX_WEIGHTS_SHARE = 0.5
"""Of a GPU's memory that an engine's weights may take: what is left holds responses."""
MAX_TP = 8
"""Most GPUs of an engine that is proposed: a node."""
KINDS = {"sft": "SFT", "preference": "preference", "distill": "distillation", "policy": "RL"}
"""Objective -> what its stage is called."""
FORWARD_TOKENS = 16384
"""Of a pass that only looks, which keeps no activations."""


# Reinforcement learning priced by its three jobs: writing, judging, learning, in turns on the same GPUs.


def engines_of(shape: ModelShape, pricing: Pricing) -> Engines:
    """Return the engines that fit a model: of as few GPUs each as hold it."""
    tp, weight_bytes = 1, shape.params() * 2
    while tp < min(MAX_TP, pricing.num_ranks) and (
            weight_bytes / tp > MAX_WEIGHTS_SHARE * pricing.chip.memory_bytes):
        tp *= 2
    return Engines(shape, pricing.chip, pricing.links, pricing.num_ranks, tp)


def asked_of(config: RunConfig, assumed: Assumed) -> DecodingRequest:
    r = config.rollout
    return DecodingRequest(r.prompts_per_round * r.samples_per_prompt,
                           assumed.prompt_share * r.max_prompt_tokens,
                           assumed.response_share * r.max_new_tokens, r.max_new_tokens, r.samples_per_prompt)


def rows_of(config: RunConfig, asked: DecodingRequest) -> int:
    """Return the rows of a run's length that a round's documents fill."""
    tokens = asked.num_responses * (asked.prompt_tokens + asked.response_tokens)
    return max(1, round(tokens / config.data.phases[0].seq_len / PACKED_SHARE))


def num_forward(config: RunConfig) -> float:
    """Return the passes over a round that only look: for a reference, and for the trainer's own
    log-probabilities, which a round's first step computes itself."""
    return (config.policy.parts.kl != "none") + 1 - 1 / config.rollout.steps_per_round


def one_round(config: RunConfig, pricing: Pricing, assumed: Assumed) -> tuple[DecodingRound, Workload,
                                                                              DecodingRequest]:
    """Return what a round takes, with its optimizer step and what it asks for."""
    asked = asked_of(config, assumed)
    rows = max(1, round(rows_of(config, asked) / config.rollout.steps_per_round))
    phase = replace(config.data.phases[0], global_batch_size=rows)
    imbalance = pricing.parameters.real_imbalance if config.model.num_moe_layers() else 1.0
    step = of_run(config, phase, pricing.num_ranks, pricing.chip, pricing.links, imbalance)
    engines = engines_of(step.shape, pricing)
    return round_of(engines, asked, step, num_forward(config), pricing.parameters), step, asked


def reinforcement(config: RunConfig, pricing: Pricing, assumed: Assumed) -> list[Quote]:
    took, step, asked = one_round(config, pricing, assumed)
    rounds, phase = max(1, config.rollout.rounds), config.data.phases[0]
    engines = engines_of(step.shape, pricing)
    responses = PhaseConfig("responses", seq_len=config.rollout.max_prompt_tokens + asked.max_tokens,
                            global_batch_size=asked.num_responses)
    written = round(rounds * asked.num_responses * asked.response_tokens)
    weights = round(step.shape.params() * engines.weight_bytes / engines.tp)
    generate = priced(
        pricing, "generate", "RL: generate", responses, steps=rounds, tokens=written,
        seconds={"prefill": took.prefill_s, "decode": took.decode_s, "last responses": took.tail_s,
                 "new weights": took.refit_s, "other": took.other_s},
        memory=QuotedMemory({"weights": weights, "keys and values": took.memory_bytes - weights},
                            int(engines.costs.memory_share * pricing.chip.memory_bytes)),
        notes=(f"generate: {engines.num_engines:,} engines of {engines.tp} "
               f"GPU{'s' if engines.tp > 1 else ''}, "
               f"{took.running:,} responses at a time in each; prompts of {asked.prompt_tokens:,.0f} and "
               f"responses of {asked.response_tokens:,.0f} tokens are assumed, the longest are "
               f"{asked.max_tokens:,}",))
    reward = priced(
        pricing, "reward", "RL: reward", responses, steps=rounds, tokens=written, on_gpus=False,
        seconds={"judge": asked.num_responses * assumed.judge_s / assumed.judge_cores},
        memory=QuotedMemory({}, 0),
        notes=(f"reward: rules or tests of {assumed.judge_s:g} s of a core for each response are assumed, on "
               f"{assumed.judge_cores} cores; a model that judges writes like the policy",))
    at, needs = fullest(config, pricing.num_ranks)
    learning = {"passes that look": took.forward_s, "optimizer steps": took.train_s}
    train = priced(
        pricing, "train", "RL: train", replace(phase, global_batch_size=step.global_batch_size), steps=rounds,
        tokens=rounds * rows_of(config, asked) * phase.seq_len,
        seconds=learning | _text(config, step, pricing),
        memory=QuotedMemory(needs.components(), pricing.limit_bytes, at, needs.on_host),
        flops_per_token=of_model(config.model).train_flops_per_token(phase.seq_len),
        notes=(f"train: {rounds:,} rounds of {config.rollout.steps_per_round} "
               f"step{'s' if config.rollout.steps_per_round > 1 else ''} each"
               + ("" if config.rollout.rounds else "; rollout.rounds is 0, one is priced"),))
    return [generate, reward, train]


def _text(config: RunConfig, step: Workload, pricing: Pricing) -> dict[str, float]:
    """Return the seconds of text that is learned beside responses, the mean over a round's steps."""
    parts = config.policy.parts
    if not config.policy.has_text:
        return {}
    text = step_time(replace(step, global_batch_size=parts.knowledge_batch_size), pricing.parameters).total_s
    return {"text beside": config.rollout.steps_per_round * parts.knowledge_share * text}


def covers(config: RunConfig) -> bool:
    """Return whether a run is post-training, which this room prices; extensions are none."""
    return config.objective.name in KINDS and not config.extend.stages


def quotes(config: RunConfig, pricing: Pricing, assumed: Assumed | None = None) -> list[Quote]:
    """Return the quotes of a run's jobs, one after the other on the same GPUs."""
    assumed = assumed or Assumed()
    if config.objective.name == "policy":
        found = reinforcement(config, pricing, assumed)
    else:
        stages = run_stages(config, pricing.num_ranks)
        before = [q for stage in stages for q in _before(stage, pricing, assumed)]
        found = [*before, *(_train(stage, pricing, assumed) for stage in stages)]
    return [replace(found[0], notes=(*found[0].notes, *told_of(config.recipe))), *found[1:]]


def _train(stage: RunStage, pricing: Pricing, assumed: Assumed) -> Quote:
    """Return the quote of the optimizer steps of a stage: a phase's, with short documents in its rows."""
    kind = KINDS[stage.config.objective.name]
    whole = quote(stage, pricing)
    document = min(assumed.document_tokens, stage.phase.seq_len)
    step = replace(pricing.workload(stage), document_tokens=document)
    seconds = step_time(step, pricing.parameters).components
    if kind == "distillation":
        seconds["teacher's head"] = _teachers_head_s(stage, pricing, assumed)
    if kind == "preference" and stage.config.preference.method == "kto":
        # its distance from the reference is one number of the whole batch, found before the losses
        forward = replace(step, objective="forward", sharding="none", recompute="none", recompute_modules=())
        seconds["distance"] = sum(step_time(forward, pricing.parameters).components.values())
    job = priced(pricing, stage.name, f"{kind}: train" if kind != "SFT" else kind,
                 replace(stage.phase, global_batch_size=stage.global_batch_size), steps=stage.steps,
                 tokens=stage.tokens, seconds=seconds, memory=whole.memory,
                 flops_per_token=whole.tflops_per_gpu * 1e12 / whole.tokens_per_s_per_gpu,
                 notes=(f"documents of {document:,} tokens are assumed in rows of "
                        f"{stage.phase.seq_len:,}",))
    return replace(job, layout=whole.layout, traffic=whole.traffic, bubble_share=whole.bubble_share,
                   imbalance=whole.imbalance, checkpoint=whole.checkpoint)


def _before(stage: RunStage, pricing: Pricing, assumed: Assumed) -> list[Quote]:
    """Return the quotes of what is done before a stage's first step: by a reference, a student, a teacher."""
    objective = stage.config.objective.name
    if objective == "preference" and stage.config.preference.method in WITH_REFERENCE:
        return [_forward(stage, pricing, "reference", "preference: reference", stage.config)]
    if objective != "distill":
        return []
    teacher = teacher_of(stage.config, assumed)
    config = replace(stage.config, model=_teacher(stage.config, assumed))
    return [_writing(stage, pricing, assumed),
            _forward(stage, pricing, "teacher", "distillation: teacher", config,
                     (f"teacher: {teacher or 'one as large as the student'} reads all samples",))]


def _teacher(config: RunConfig, assumed: Assumed) -> ModelConfig:
    """Return the teacher's model; the student's where nobody names one."""
    name = teacher_of(config, assumed)
    return recipes.get(name).model if name else config.model


def _forward(stage: RunStage, pricing: Pricing, name: str, kind: str, config: RunConfig,
             notes: tuple[str, ...] = ()) -> Quote:
    """Return the quote of one pass over all of a stage's tokens that only looks, every GPU by itself or with
    as few others as hold the model."""
    shape = of_model(config.model)
    engines = engines_of(shape, pricing)
    base = pricing.workload(stage)
    replicas = max(1, pricing.num_ranks // engines.tp)
    together = max(1, min(FORWARD_TOKENS // stage.phase.seq_len, stage.global_batch_size // replicas))
    alone = replace(base, shape=shape, micro_batch_size=together, tp=engines.tp, sp=engines.tp > 1, pp=1,
                    vpp=1, cp=1, ep=1, etp=1, sharding="none", objective="forward", recompute="none",
                    recompute_modules=())
    weights = round(shape.params() * 2 / engines.tp)
    seconds = step_time(alone, pricing.parameters).components
    return priced(pricing, name, kind, replace(stage.phase, global_batch_size=stage.global_batch_size),
                  steps=stage.steps, tokens=stage.tokens, seconds=seconds,
                  memory=QuotedMemory({"weights": weights}, pricing.limit_bytes),
                  flops_per_token=shape.forward_flops_per_token(stage.phase.seq_len), notes=notes)


def _writing(stage: RunStage, pricing: Pricing, assumed: Assumed) -> Quote:
    """Return the quote of what the student writes itself, turn by turn; half of a row is the longest
    response.  Each turn has to bring student and teacher to the GPUs."""
    longest = max(1, stage.phase.seq_len // 2)
    samples = max(1, round(stage.steps * stage.global_batch_size * assumed.student_share))
    asked = DecodingRequest(-(-samples // assumed.turns), assumed.prompt_share * longest,
                            assumed.response_share * longest, longest)
    engines = engines_of(of_model(stage.config.model), pricing)
    took, costs = writing(engines, asked, pricing.parameters), engines.costs
    moved = (engines.shape.params() + of_model(_teacher(stage.config, assumed)).params()) * 2
    weights = round(engines.shape.params() * engines.weight_bytes / engines.tp)
    return priced(
        pricing, "write", "distillation: write", replace(stage.phase, global_batch_size=asked.num_responses),
        steps=assumed.turns, tokens=round(assumed.turns * asked.num_responses * asked.response_tokens),
        seconds={"prefill": took.prefill_s, "decode": took.decode_s, "last responses": took.tail_s,
                 "models come and go": moved / costs.refit_bytes_per_s, "other": costs.round_s},
        memory=QuotedMemory({"weights": weights, "keys and values": took.memory_bytes - weights},
                            int(engines.costs.memory_share * pricing.chip.memory_bytes)),
        notes=(f"write: the student answers {samples:,} prompts ({assumed.student_share:.0%} of the "
               f"samples) in {assumed.turns:,} turns, {asked.response_tokens:,.0f} tokens each",))


def _teachers_head_s(stage: RunStage, pricing: Pricing, assumed: Assumed) -> float:
    """Return the seconds of the teacher's output head in a step, which the student's last stage applies to
    its hidden states."""
    model = _teacher(stage.config, assumed)
    flops = 2 * model.hidden_size * model.vocab_size * stage.global_batch_size * stage.phase.seq_len
    share = pricing.parameters.product_fraction[pricing.chip.generation]["bf16"]
    on = pricing.num_ranks / stage.config.parallel.pp
    return flops / on / (pricing.chip.bf16_flops_per_s * share)

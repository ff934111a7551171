"""Reinforcement learning priced by its three jobs: writing, judging, learning, in turns on the same GPUs."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import PhaseConfig, RunConfig
from megatron_sov.plan.fitting import fullest
from megatron_sov.plan.post_training.assumed import Assumed
from megatron_sov.plan.post_training.decoding import Asked, Engines
from megatron_sov.plan.post_training.priced import priced
from megatron_sov.plan.post_training.rounds import PACKED_SHARE, Round, round_of
from megatron_sov.plan.pricing import Pricing
from megatron_sov.plan.quote import Memory, Quote
from megatron_sov.plan.speed.shape import ModelShape, of_model
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import Workload, of_run

MAX_WEIGHTS_SHARE = 0.5
"""Of a GPU's memory that an engine's weights may take: what is left holds responses."""
MAX_TP = 8
"""Most GPUs of an engine that is proposed: a node."""


def engines_of(shape: ModelShape, pricing: Pricing) -> Engines:
    """Return the engines that fit a model: of as few GPUs each as hold it."""
    tp, weight_bytes = 1, shape.params() * 2
    while tp < min(MAX_TP, pricing.num_ranks) and (
            weight_bytes / tp > MAX_WEIGHTS_SHARE * pricing.chip.memory_bytes):
        tp *= 2
    return Engines(shape, pricing.chip, pricing.links, pricing.num_ranks, tp)


def asked_of(config: RunConfig, assumed: Assumed) -> Asked:
    """Return what a round asks for."""
    r = config.rollout
    return Asked(r.prompts_per_round * r.samples_per_prompt, assumed.prompt_share * r.max_prompt_tokens,
                 assumed.response_share * r.max_new_tokens, r.max_new_tokens, r.samples_per_prompt)


def rows_of(config: RunConfig, asked: Asked) -> int:
    """Return the rows of a run's length that a round's documents fill."""
    tokens = asked.num_responses * (asked.prompt_tokens + asked.response_tokens)
    return max(1, round(tokens / config.data.phases[0].seq_len / PACKED_SHARE))


def num_forward(config: RunConfig) -> float:
    """Return the passes over a round that only look: for a reference, and for the trainer's own
    log-probabilities, which a round's first step computes itself."""
    return (config.policy.parts.kl != "none") + 1 - 1 / config.rollout.steps_per_round


def one_round(config: RunConfig, pricing: Pricing, assumed: Assumed) -> tuple[Round, Workload, Asked]:
    """Return what a round takes, with its optimizer step and what it asks for."""
    asked = asked_of(config, assumed)
    rows = max(1, round(rows_of(config, asked) / config.rollout.steps_per_round))
    phase = replace(config.data.phases[0], global_batch_size=rows)
    imbalance = pricing.parameters.real_imbalance if config.model.num_moe_layers() else 1.0
    step = of_run(config, phase, pricing.num_ranks, pricing.chip, pricing.links, imbalance)
    engines = engines_of(step.shape, pricing)
    return round_of(engines, asked, step, num_forward(config), pricing.parameters), step, asked


def reinforcement(config: RunConfig, pricing: Pricing, assumed: Assumed) -> list[Quote]:
    """Return the quotes of the three jobs over all rounds."""
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
        memory=Memory({"weights": weights, "keys and values": took.engine_bytes - weights},
                      int(engines.costs.memory_share * pricing.chip.memory_bytes)),
        notes=(f"generate: {engines.num_engines:,} engines of {engines.tp} "
               f"GPU{'s' if engines.tp > 1 else ''}, "
               f"{took.running:,} responses at a time in each; prompts of {asked.prompt_tokens:,.0f} and "
               f"responses of {asked.response_tokens:,.0f} tokens are assumed, the longest are "
               f"{asked.max_tokens:,}",))
    reward = priced(
        pricing, "reward", "RL: reward", responses, steps=rounds, tokens=written, on_gpus=False,
        seconds={"judge": asked.num_responses * assumed.judge_s / assumed.judge_cores}, memory=Memory({}, 0),
        notes=(f"reward: rules or tests of {assumed.judge_s:g} s of a core for each response are assumed, on "
               f"{assumed.judge_cores} cores; a model that judges writes like the policy",))
    at, needs = fullest(config, pricing.num_ranks)
    learning = {"passes that look": took.forward_s, "optimizer steps": took.train_s}
    train = priced(
        pricing, "train", "RL: train", replace(phase, global_batch_size=step.global_batch_size), steps=rounds,
        tokens=rounds * rows_of(config, asked) * phase.seq_len,
        seconds=learning | _text(config, step, pricing),
        memory=Memory(needs.components(), pricing.limit_bytes, at, needs.on_host),
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

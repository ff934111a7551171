"""The price of post-training by its jobs, and what it needs beside a recipe's settings.

Writing is priced by the roofline of prefill and decode on engines of some GPUs each.  A step of decoding
gives every running response one token.  It reads the weights that these tokens meet, once, and each one's
keys and values; it multiplies, and it has its host, its messages and its sampling.  Responses end at each
token with the same probability, up to the largest length: how many still run thins out, and the last steps
are done for few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig, PhaseConfig, RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE
from megatron_sov.plan.calibration.fitting import TEACHERS, fullest
from megatron_sov.plan.footprint.held import BF16_BYTES
from megatron_sov.plan.operation import cost
from megatron_sov.plan.pages.quote import Quote, QuotedMemory
from megatron_sov.plan.pricing import Pricing, RunStage, quote, run_stages
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import ModelShape, Workload, kv_bytes, kv_cuts, of_model, of_run
from megatron_sov.work.clusters.chips import Chip, Links
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR

SLICES = 64
"""Stretches of a response over which the number of running ones is taken for constant."""


@dataclass(frozen=True)
class EngineCosts:
    """What no roofline tells of an engine; fitted to published rounds of reinforcement learning
    (`benchmarks/plan_post_training.py --fit`)."""

    step_s: float = 4e-3
    """Seconds of a step for scheduling, whatever runs."""
    layer_s: float = 58e-6
    """Seconds of a layer in a step, beside what it reads: kernels of few microseconds each."""
    response_s: float = 11e-6
    """Seconds of a step for each running response: sampling, copying, stopping."""
    message_s: float = 40e-6
    """Seconds of one of the two messages of a layer under tensor parallelism, beside its bytes."""
    memory_share: float = 0.85
    """Share of a GPU's memory that weights and cache may fill."""
    max_running: int = 1024
    """Responses that an engine runs at a time, as far as its cache holds them."""
    refit_bytes_per_s: float = 19e9
    """Bytes of new weights a second, over all engines, where trainer and engines take turns on the same GPUs:
    what is in the way leaves and comes back within it."""
    round_s: float = 19.0
    """Seconds of a round for what is none of that: prompts, rewards that are rules, advantages."""


@dataclass(frozen=True)
class Engines:
    """Engines that write beside one another."""

    shape: ModelShape
    chip: Chip
    links: Links
    num_gpus: int
    tp: int = 1
    weight_bytes: float = 2.0
    """Of a weight as engines hold it: 1 in FP8."""
    costs: EngineCosts = EngineCosts()

    @property
    def num_engines(self) -> int:
        return max(1, self.num_gpus // self.tp)


@dataclass(frozen=True)
class DecodingRequest:
    num_responses: int
    prompt_tokens: float
    response_tokens: float
    max_tokens: int
    per_prompt: int = 1
    """Responses to one prompt, which is read once for all of them."""

    @property
    def ends_after_tokens(self) -> float:
        """Mean length that responses would have without a longest one; infinite where nearly all are cut."""
        mean = min(self.response_tokens, 0.98 * self.max_tokens)
        # Bisection for m in E[min(X, max)] = m (1 - exp(-max / m)), X exponential: no closed form. In
        # logarithms, since m may be huge.
        low, high = mean, 1e3 * self.max_tokens
        for _ in range(60):
            middle = math.sqrt(low * high)
            reached = middle * -math.expm1(-self.max_tokens / middle)
            low, high = (middle, high) if reached < mean else (low, middle)
        return low


@dataclass(frozen=True)
class DecodingWriting:
    prefill_s: float
    decode_s: float
    """Steps with as many responses as an engine runs at a time."""
    tail_s: float
    """Steps of the last ones, which thin out."""
    running: int
    """Responses that an engine runs at a time."""
    memory_bytes: int
    """Weights and cache of one GPU."""

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s + self.tail_s


def writing(engines: Engines, asked: DecodingRequest, parameters: Parameters) -> DecodingWriting:
    e = engines
    # The fullest engine sets the time, so round up.
    mine = max(1, -(-asked.num_responses // e.num_engines))
    context = asked.prompt_tokens + asked.response_tokens / 2
    longest = asked.prompt_tokens + asked.response_tokens
    weights = e.shape.params() * e.weight_bytes / e.tp
    room = e.costs.memory_share * e.chip.memory_bytes - weights
    # Room is reserved for the length at the end, else responses would be thrown out of the cache midway.
    held = int(max(1, room / (kv_bytes(e.shape, longest) / kv_cuts(e.shape, e.tp))))
    running = min(mine, held, e.costs.max_running)
    full_s = step_s(e, running, context, parameters)
    decode_s = (mine - running) * asked.response_tokens / running * full_s
    tail_s = sum(steps * step_s(e, max(1.0, alive * running), asked.prompt_tokens + token, parameters)
                 for token, steps, alive in _thinning(asked, running * e.num_engines))
    prompts = mine * asked.prompt_tokens / asked.per_prompt
    prefill_s = prompts * e.shape.forward_flops_per_token(max(1, round(asked.prompt_tokens))) / (
        e.tp * e.chip.bf16_flops_per_s * product_share(e.chip, parameters))
    cache = running * kv_bytes(e.shape, context) / kv_cuts(e.shape, e.tp)
    return DecodingWriting(prefill_s, decode_s, tail_s, running, round(weights + cache))


def _thinning(asked: DecodingRequest, together: int) -> Iterator[tuple[float, float, float]]:
    """Yield (tokens written, steps that are expected, share of the responses that still run) over the longest
    response; a step is done while any of `together` responses runs, for a round waits for the last one."""
    steps, mean = asked.max_tokens / SLICES, asked.ends_after_tokens
    for i in range(SLICES):
        token = (i + 0.5) * steps
        alive = math.exp(-token / mean)
        # 1 - (1 - p)^n: the probability that at least one of n responses still runs.
        yield token, steps * (1 - (1 - alive) ** together), alive


def step_s(engines: Engines, running: float, context: float, parameters: Parameters) -> float:
    """Return the seconds of a step of decoding."""
    s, chip, costs, tp = engines.shape, engines.chip, engines.costs, engines.tp
    passed = (touched_params(s, running) * engines.weight_bytes / tp
              + running * kv_bytes(s, context) / kv_cuts(s, tp))
    flops = running * s.decode_flops_per_token(context) / tp
    roofline = max(passed / (chip.hbm_bytes_per_s * parameters.hbm_fraction),
                   flops / (chip.bf16_flops_per_s * product_share(chip, parameters)))
    host = costs.step_s + s.num_layers * costs.layer_s + running * costs.response_s
    return roofline + host + _messages_s(engines, running)


def _messages_s(engines: Engines, running: float) -> float:
    """Return the seconds of a step's messages of tensor parallelism: two all-reduces a layer."""
    tp, links = engines.tp, engines.links
    if tp == 1:
        return 0.0
    inside = tp <= links.domain
    rate = links.inside_bytes_per_s if inside else links.between_bytes_per_s
    num_bytes = 2 * (tp - 1) / tp * running * engines.shape.hidden_size * BF16_BYTES
    hops = math.log2(tp) * (links.inside_latency_s if inside else links.between_latency_s)
    return 2 * engines.shape.num_layers * (num_bytes / rate + hops + engines.costs.message_s)


def touched_params(shape: ModelShape, running: float) -> float:
    """Return the weights that a step reads: of each layer's experts those that at least one of `running`
    tokens is sent to, experts being drawn alike."""
    # Untied embeddings are looked up, not read as a whole.
    everywhere = shape.active_params() - (0 if shape.tied else shape.vocab_size * shape.hidden_size)
    if not shape.num_experts:
        return everywhere
    share = shape.num_experts_per_token / shape.num_experts
    # E (1 - (1 - k/E)^n) by expm1 and log1p, which keep their digits where k/E is small.
    met = shape.num_experts * -math.expm1(running * math.log1p(-share)) if share < 1 else shape.num_experts
    beyond = max(0.0, met - shape.num_experts_per_token)
    return everywhere + shape.num_moe_layers * beyond * shape.block_params("expert")


def product_share(chip: Chip, parameters: Parameters) -> float:
    """Return the share of the peak that large products reach."""
    return parameters.product_fraction[chip.generation]["bf16"]


# A round of reinforcement learning as three jobs: what each takes on its GPUs, in turns or apart.


PACKED_SHARE = 0.95
"""Share of a row's tokens that are some document's, when whole documents are packed into rows best-fit."""


@dataclass(frozen=True)
class DecodingRound(DecodingWriting):
    """Seconds of one round, by job: generate's are those of `DecodingWriting`."""

    forward_s: float
    """Train: passes that only look, for a reference and for the trainer's own log-probabilities."""
    train_s: float
    refit_s: float
    """New weights on their way into the engines."""
    other_s: float

    @property
    def generate_s(self) -> float:
        return super().total_s

    @property
    def learn_s(self) -> float:
        return self.forward_s + self.train_s

    @property
    def total_s(self) -> float:
        """Seconds of the round: its jobs take turns on the same GPUs."""
        return self.generate_s + self.learn_s + self.refit_s + self.other_s


def round_of(engines: Engines, asked: DecodingRequest, step: Workload, num_forward: float,
             parameters: Parameters) -> DecodingRound:
    """Return what a round takes.

    Args:
        engines: what writes.
        asked: what is written.
        step: an optimizer step of the trainer; its rows are filled with the round's documents, and its batch
            size says how many of them make a step.
        num_forward: passes over the round that only look.
        parameters: those of the model of speed.
    """
    costs: EngineCosts = engines.costs
    tokens = asked.num_responses * (asked.prompt_tokens + asked.response_tokens)
    rows = max(1, round(tokens / step.seq_len / PACKED_SHARE))
    whole = replace(step, global_batch_size=rows,
                    document_tokens=round(asked.prompt_tokens + asked.response_tokens))
    one = replace(whole, global_batch_size=min(rows, step.global_batch_size))
    steps = max(1, round(rows / one.global_batch_size))
    forward_s = num_forward * step_time(replace(whole, objective="forward"), parameters).total_s
    written = writing(engines, asked, parameters)
    weight_bytes = engines.shape.params() * engines.weight_bytes
    return DecodingRound(**vars(written), forward_s=forward_s,
                         train_s=steps * step_time(one, parameters).total_s,
                         refit_s=weight_bytes / costs.refit_bytes_per_s, other_s=costs.round_s)


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


# Lengths of documents and responses, which nobody knows before the run.


DOCUMENT_TOKENS = 1000
"""Fine-tuning: mean tokens of a conversation; attention stays inside of it (Typhoon-S: 340,000 of about 1,000
each)."""
RESPONSE_SHARE = 0.5
"""Mean tokens of a response beside the longest that the settings allow."""
PROMPT_SHARE = 0.25
"""The same of a prompt."""
STUDENT_SHARE = 0.25
"""Distillation: share of the samples that the student writes itself (Typhoon-S's lambda)."""
TURNS = 10
"""Distillation: how often the student writes anew with what it has learned."""
JUDGE_S, JUDGE_CORES = 0.1, 32
"""Seconds of a processor core to judge a response by rules or tests, and cores that judge."""


# What post-training takes, by its jobs: fine-tuning, distillation, preference, reinforcement learning.


DECODING = "steps of decoding take what NeMo RL's with vLLM took in published rounds"
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
    tp, weight_bytes = 1, shape.params() * 2  # powers of two divide heads
    while tp < min(MAX_TP, pricing.num_ranks) and (
            weight_bytes / tp > MAX_WEIGHTS_SHARE * pricing.chip.memory_bytes):
        tp *= 2
    return Engines(shape, pricing.chip, pricing.links, pricing.num_ranks, tp)


def decoding_request(config: RunConfig) -> DecodingRequest:
    r = config.rollout
    return DecodingRequest(r.prompts_per_round * r.samples_per_prompt,
                           PROMPT_SHARE * r.max_prompt_tokens,
                           RESPONSE_SHARE * r.max_new_tokens, r.max_new_tokens, r.samples_per_prompt)


def rows_of(config: RunConfig, asked: DecodingRequest) -> int:
    """Return the rows of a run's length that a round's documents fill."""
    # of preferences by pairs a group's best and worst alone
    pair = config.documents_of_unit
    learned = pair / config.rollout.samples_per_prompt if pair > 1 else 1.0
    tokens = learned * asked.num_responses * (asked.prompt_tokens + asked.response_tokens)
    return max(1, round(tokens / config.data.phases[0].seq_len / PACKED_SHARE))


def num_forward(config: RunConfig) -> float:
    """Return the passes over a round that only look: for a reference, and for the trainer's own
    log-probabilities, which a round's first step computes itself; or a teacher's."""
    if config.policy.learns_distributions:
        return 1.0
    later = 1 - 1 / config.rollout.steps_per_round
    if config.policy.learns_preferences:
        compares = config.preference.method in WITH_REFERENCE
        return compares * (later if config.policy.reference == "round" else 1.0)
    # One pass for the reference, and one for old log-probabilities, less the first step, where old and new
    # are the same.
    return (config.policy.parts.kl != "none") + later


def one_round(config: RunConfig, pricing: Pricing) -> tuple[DecodingRound, Workload, DecodingRequest]:
    """Return what a round takes, with its optimizer step and what it asks for."""
    asked = decoding_request(config)
    rows = max(1, round(rows_of(config, asked) / config.rollout.steps_per_round))
    phase = replace(config.data.phases[0], global_batch_size=rows)
    imbalance = pricing.parameters.real_imbalance if config.model.num_moe_layers() else 1.0
    step = of_run(config, phase, pricing.num_ranks, pricing.chip, pricing.links, imbalance)
    engines = engines_of(step.shape, pricing)
    return round_of(engines, asked, step, num_forward(config), pricing.parameters), step, asked


def reinforcement(config: RunConfig, pricing: Pricing) -> list[Quote]:
    took, step, asked = one_round(config, pricing)
    rounds, phase = max(1, config.rollout.rounds), config.data.phases[0]
    engines = engines_of(step.shape, pricing)
    responses = PhaseConfig("responses", seq_len=config.rollout.max_prompt_tokens + asked.max_tokens,
                            global_batch_size=asked.num_responses)
    has_teacher = config.policy.learns_distributions
    # all other rounds of such a run are of its data
    writes = max(1, round(rounds * config.policy.on_policy_share)) if has_teacher else rounds
    written = round(writes * asked.num_responses * asked.response_tokens)
    weights = round(step.shape.params() * engines.weight_bytes / engines.tp)
    generate = priced(
        pricing, "generate", "RL: generate", responses, steps=writes, tokens=written,
        seconds={"prefill": took.prefill_s, "decode": took.decode_s, "last responses": took.tail_s,
                 "new weights": took.refit_s, "other": took.other_s},
        memory=QuotedMemory({"weights": weights, "keys and values": took.memory_bytes - weights},
                            int(engines.costs.memory_share * pricing.chip.memory_bytes)),
        notes=(f"generate: {engines.num_engines:,} engines of {engines.tp} "
               f"GPU{'s' if engines.tp > 1 else ''}, "
               f"{took.running:,} responses at a time in each; prompts of {asked.prompt_tokens:,.0f} and "
               f"responses of {asked.response_tokens:,.0f} tokens are assumed, the longest are "
               f"{asked.max_tokens:,}", DECODING))
    reward = priced(
        pricing, "reward", "RL: reward", responses, steps=rounds, tokens=written, on_gpus=False,
        seconds={"judge": asked.num_responses * JUDGE_S / JUDGE_CORES},
        memory=QuotedMemory({}, 0),
        notes=(f"reward: rules or tests of {JUDGE_S:g} s of a core for each response are assumed, on "
               f"{JUDGE_CORES} cores; a model that judges writes like the policy",))
    teacher = _teacher(config) if has_teacher else None
    at, needs = fullest(config, pricing.num_ranks, teacher)
    learning = {"passes that look": took.forward_s, "optimizer steps": took.train_s}
    told = "" if config.rollout.rounds else "; rollout.rounds is 0, one is priced"
    if teacher is not None:
        learning["passes that look"] *= (of_model(teacher).forward_flops_per_token(phase.seq_len)
                                         / step.shape.forward_flops_per_token(phase.seq_len))
        told += f"; teacher beside: {TEACHERS.get(config.recipe, 'one as large as the student')}"
    train = priced(
        pricing, "train", "RL: train", replace(phase, global_batch_size=step.global_batch_size), steps=rounds,
        tokens=rounds * rows_of(config, asked) * phase.seq_len,
        seconds=learning | _text(config, step, pricing),
        memory=QuotedMemory(needs.components(), pricing.limit_bytes, at, needs.on_host),
        flops_per_token=of_model(config.model).train_flops_per_token(phase.seq_len),
        notes=(f"train: {rounds:,} rounds of {config.rollout.steps_per_round} "
               f"step{'s' if config.rollout.steps_per_round > 1 else ''} each{told}",))
    return [generate, train] if has_teacher else [generate, reward, train]


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


def quotes(config: RunConfig, pricing: Pricing) -> list[Quote]:
    """Return the quotes of a run's jobs, one after the other on the same GPUs."""
    if config.objective.name == "policy":
        return reinforcement(config, pricing)
    stages = run_stages(config, pricing.num_ranks)
    before = [q for stage in stages for q in _before(stage, pricing)]
    return [*before, *(_train(stage, pricing) for stage in stages)]


def _train(stage: RunStage, pricing: Pricing) -> Quote:
    """Return the quote of the optimizer steps of a stage: a phase's, with short documents in its rows."""
    kind = KINDS[stage.config.objective.name]
    whole = quote(stage, pricing)
    document = min(DOCUMENT_TOKENS, stage.phase.seq_len)
    step = replace(pricing.workload(stage), document_tokens=document)
    seconds = step_time(step, pricing.parameters).components
    if kind == "distillation":
        seconds["teacher's head"] = _teachers_head_s(stage, pricing)
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


def _before(stage: RunStage, pricing: Pricing) -> list[Quote]:
    """Return the quotes of what is done before a stage's first step: by a reference, a student, a teacher."""
    objective = stage.config.objective.name
    if objective == "preference" and stage.config.preference.method in WITH_REFERENCE:
        return [_forward(stage, pricing, "reference", "preference: reference", stage.config)]
    if objective != "distill":
        return []
    config = replace(stage.config, model=_teacher(stage.config))
    return [_writing(stage, pricing),
            _forward(stage, pricing, "teacher", "distillation: teacher", config,
                     (f"teacher: {TEACHERS.get(stage.config.recipe, 'one as large as the student')} reads "
                       "all samples",))]


def _teacher(config: RunConfig) -> ModelConfig:
    """Return the teacher's model; the student's where nobody names one."""
    name = TEACHERS.get(config.recipe)
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


def _writing(stage: RunStage, pricing: Pricing) -> Quote:
    """Return the quote of what the student writes itself, turn by turn; half of a row is the longest
    response.  Each turn has to bring student and teacher to the GPUs."""
    longest = max(1, stage.phase.seq_len // 2)
    samples = max(1, round(stage.steps * stage.global_batch_size * STUDENT_SHARE))
    asked = DecodingRequest(-(-samples // TURNS), PROMPT_SHARE * longest,
                            RESPONSE_SHARE * longest, longest)
    engines = engines_of(of_model(stage.config.model), pricing)
    took, costs = writing(engines, asked, pricing.parameters), engines.costs
    moved = (engines.shape.params() + of_model(_teacher(stage.config)).params()) * 2
    weights = round(engines.shape.params() * engines.weight_bytes / engines.tp)
    return priced(
        pricing, "write", "distillation: write", replace(stage.phase, global_batch_size=asked.num_responses),
        steps=TURNS, tokens=round(TURNS * asked.num_responses * asked.response_tokens),
        seconds={"prefill": took.prefill_s, "decode": took.decode_s, "last responses": took.tail_s,
                 "models come and go": moved / costs.refit_bytes_per_s, "other": costs.round_s},
        memory=QuotedMemory({"weights": weights, "keys and values": took.memory_bytes - weights},
                            int(engines.costs.memory_share * pricing.chip.memory_bytes)),
        notes=(f"write: the student answers {samples:,} prompts ({STUDENT_SHARE:.0%} of the "
               f"samples) in {TURNS:,} turns, {asked.response_tokens:,.0f} tokens each",
               DECODING))


def _teachers_head_s(stage: RunStage, pricing: Pricing) -> float:
    """Return the seconds of the teacher's output head in a step, which the student's last stage applies to
    its hidden states."""
    model = _teacher(stage.config)
    flops = 2 * model.hidden_size * model.vocab_size * stage.global_batch_size * stage.phase.seq_len
    share = pricing.parameters.product_fraction[pricing.chip.generation]["bf16"]
    on = pricing.num_ranks / stage.config.parallel.pp
    return flops / on / (pricing.chip.bf16_flops_per_s * share)

"""How long a model takes to write: the roofline of prefill and decode on engines of some GPUs each.

A step of decoding gives every running response one token.  It reads the weights that these tokens meet, once,
and each one's keys and values; it multiplies, and it has its host, its messages and its sampling.  Responses
end at each token with the same probability, up to the largest length: how many still run thins out, and the
last steps are done for few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_sov.plan.footprint.held import BF16_BYTES
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import ModelShape, Workload, kv_bytes, kv_cuts
from megatron_sov.work.clusters.chips import Chip, Links

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
    refit_apart_bytes_per_s: float = 48e9
    """The same where engines have GPUs of their own."""
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
    rounds_ahead: int = 0
    """Rounds that may be under way before the last response of the first of them; 0: engines stand still when
    few responses are left, until the next policy."""

    @property
    def ends_after_tokens(self) -> float:
        """Mean length that responses would have without a longest one; infinite where nearly all are cut."""
        mean = min(self.response_tokens, 0.98 * self.max_tokens)
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
    mine = max(1, -(-asked.num_responses // e.num_engines))
    context = asked.prompt_tokens + asked.response_tokens / 2
    longest = asked.prompt_tokens + asked.response_tokens
    weights = e.shape.params() * e.weight_bytes / e.tp
    room = e.costs.memory_share * e.chip.memory_bytes - weights
    held = int(max(1, room / (kv_bytes(e.shape, longest) / kv_cuts(e.shape, e.tp))))
    running = min(mine * max(1, asked.rounds_ahead), held, e.costs.max_running)
    full_s = step_s(e, running, context, parameters)
    if asked.rounds_ahead:
        decode_s, tail_s = mine * asked.response_tokens / running * full_s, 0.0
    else:
        decode_s = (mine - running) * asked.response_tokens / running * full_s
        tail_s = sum(
            steps * step_s(e, max(1.0, alive * running), asked.prompt_tokens + token, parameters)
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
    everywhere = shape.active_params() - shape.vocab_size * shape.hidden_size * (not shape.tied)
    if not shape.num_experts:
        return everywhere
    share = shape.num_experts_per_token / shape.num_experts
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
    apart: bool
    """Whether engines and trainer have GPUs of their own, and work at the same time."""

    @property
    def generate_s(self) -> float:
        return super().total_s

    @property
    def learn_s(self) -> float:
        return self.forward_s + self.train_s

    @property
    def total_s(self) -> float:
        """Seconds of the round: of jobs that work at the same time the longer one."""
        together = max(self.generate_s, self.learn_s) if self.apart else self.generate_s + self.learn_s
        return together + self.refit_s + self.other_s


def round_of(engines: Engines, asked: DecodingRequest, step: Workload, num_forward: float,
             parameters: Parameters, *, apart: bool = False) -> DecodingRound:
    """Return what a round takes.

    Args:
        engines: what writes.
        asked: what is written.
        step: an optimizer step of the trainer; its rows are filled with the round's documents, and its batch
            size says how many of them make a step.
        num_forward: passes over the round that only look.
        parameters: those of the model of speed.
        apart: whether engines and trainer have GPUs of their own.
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
    rate = costs.refit_apart_bytes_per_s if apart else costs.refit_bytes_per_s
    return DecodingRound(**vars(written), forward_s=forward_s,
                         train_s=steps * step_time(one, parameters).total_s,
                         refit_s=weight_bytes / rate, other_s=costs.round_s, apart=apart)

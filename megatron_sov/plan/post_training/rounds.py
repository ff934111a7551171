"""A round of reinforcement learning as three jobs: what each takes on its GPUs, in turns or apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sov.plan.post_training.decoding import Asked, EngineCosts, Engines, writing
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import Workload

PACKED_SHARE = 0.95
"""Share of a row's tokens that are some document's, when whole documents are packed into rows best-fit."""


@dataclass(frozen=True)
class Round:
    """Seconds of one round, by job."""

    prefill_s: float
    """Generate: reading the prompts."""
    decode_s: float
    """Generate: writing while engines are full."""
    tail_s: float
    """Generate: writing the last and longest responses."""
    forward_s: float
    """Train: passes that only look, for a reference and for the trainer's own log-probabilities."""
    train_s: float
    """Train: optimizer steps."""
    refit_s: float
    """New weights on their way into the engines."""
    other_s: float
    """What is none of these."""
    apart: bool
    """Whether engines and trainer have GPUs of their own, and work at the same time."""
    engine_bytes: int
    """Memory of a GPU of an engine."""
    running: int
    """Responses that an engine runs at a time."""

    @property
    def generate_s(self) -> float:
        """Seconds of the engines."""
        return self.prefill_s + self.decode_s + self.tail_s

    @property
    def learn_s(self) -> float:
        """Seconds of the trainer."""
        return self.forward_s + self.train_s

    @property
    def total_s(self) -> float:
        """Seconds of the round: of jobs that work at the same time the longer one."""
        together = max(self.generate_s, self.learn_s) if self.apart else self.generate_s + self.learn_s
        return together + self.refit_s + self.other_s


def round_of(engines: Engines, asked: Asked, step: Workload, num_forward: float, parameters: Parameters, *,
             apart: bool = False) -> Round:
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
    return Round(written.prefill_s, written.decode_s, written.tail_s, forward_s,
                 steps * step_time(one, parameters).total_s, weight_bytes / rate, costs.round_s, apart,
                 written.memory_bytes, written.running)

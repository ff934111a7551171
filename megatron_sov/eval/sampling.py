"""Several responses to each prompt, by any engine, written down as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.generate.asking import Asked
from megatron_sov.generate.engine import Engine
from megatron_sov.generate.request import Sampling, Stop

CALL_SAMPLES = 1024
"""Responses that an engine is asked for at a time, and lost at most when the command is killed."""


@dataclass(frozen=True)
class Sampled:
    """What is sampled; what a call of the engine gives follows from it and nothing else."""

    rows: Sequence[dict[str, Any]]
    """Prompts with all that their reward needs."""
    asked: Asked
    """The same prompts as tokens."""
    num_samples: int
    """Responses to each prompt."""
    sampling: Sampling
    """How tokens are chosen."""
    stop: Stop
    """What ends a response."""

    @property
    def num_responses(self) -> int:
        return len(self.rows) * self.num_samples

    def responses(self, engine: Engine, num_done: int) -> Iterator[list[bytes]]:
        """Yield the lines behind the first `num_done`, call by call: a prompt's responses stand together.

        Each response has random numbers of its own, by its place among all; an engine whose samples depend on
        their batch meets the same batches when it goes on.
        """
        prompts_a_call = max(1, CALL_SAMPLES // self.num_samples)
        first = num_done // (prompts_a_call * self.num_samples) * prompts_a_call
        for begin in range(first, len(self.rows), prompts_a_call):
            prompts = range(begin, min(begin + prompts_a_call, len(self.rows)))
            places = [(i, sample) for i in prompts for sample in range(self.num_samples)]
            found = engine.generate([self.asked.ids[i] for i, _ in places], self.sampling, stop=self.stop,
                                    streams=[i * self.num_samples + sample for i, sample in places])
            lines = [self._line(i, sample, tokens, reason) for (i, sample), tokens, reason in
                     zip(places, found.continuations, found.finish_reasons, strict=True)]
            yield lines[max(0, num_done - begin * self.num_samples):]

    def _line(self, index: int, sample: int, tokens: list[int], finish_reason: str) -> bytes:
        row = {**self.rows[index], "prompt_index": index, "sample": sample,
               "response": self.stop.cut_text(self.asked.decode(tokens)), "num_tokens": len(tokens),
               "finish_reason": finish_reason}
        return json.dumps(row).encode() + b"\n"


def write_responses(sampled: Sampled, engine: Engine, num_done: int,
                    write: Callable[[list[bytes]], object]) -> int:
    """Have an engine write what is not there yet; called on every process that the engine runs on.

    Args:
        sampled: what.
        engine: which.
        num_done: responses that an earlier, killed command has left.
        write: is given the lines of each call.

    Returns:
        How many were written now.
    """
    written = 0
    for lines in sampled.responses(engine, num_done):
        write(lines)
        written += len(lines)
    return written

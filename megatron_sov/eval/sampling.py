"""Several responses to each prompt, by any engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    def calls(self) -> list[range]:
        """Return the prompts of each call of an engine: one whose samples depend on their batch meets the
        same batches behind a kill."""
        size = max(1, CALL_SAMPLES // self.num_samples)
        return [range(begin, min(begin + size, len(self.rows))) for begin in range(0, len(self.rows), size)]

    def ask(self, engine: Engine, prompts: range) -> bytes:
        """Return the rows of all responses to some prompts, those to one together; called on every process
        that the engine runs on.  Each response has random numbers of its own, by its place among all."""
        places = [(i, sample) for i in prompts for sample in range(self.num_samples)]
        found = engine.generate([self.asked.ids[i] for i, _ in places], self.sampling, stop=self.stop,
                                streams=[i * self.num_samples + sample for i, sample in places])
        return b"".join(self._line(i, sample, tokens, reason) for (i, sample), tokens, reason in
                        zip(places, found.continuations, found.finish_reasons, strict=True))

    def _line(self, index: int, sample: int, tokens: list[int], finish_reason: str) -> bytes:
        row = {**self.rows[index], "prompt_index": index, "sample": sample,
               "response": self.stop.cut_text(self.asked.decode(tokens)), "num_tokens": len(tokens),
               "finish_reason": finish_reason}
        return json.dumps(row).encode() + b"\n"

"""What a generator makes: a record of an ordinary source, and what was checked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["text", "chat", "prompt", "task"]
"""text: a document with `text`, for pretraining; chat: a conversation with `messages` and, where it has
tools, `tools`, for `sft`; prompt: `prompt` and what its reward needs, for `rl generate`; task: a task of a
tool environment."""


@dataclass(frozen=True)
class Verdict:
    """What one check says of one sample."""

    check: str
    """Name of the check; the same for all samples that it refuses."""
    passed: bool
    """Whether the sample may be kept as far as this check is concerned."""
    detail: str = ""
    """What it has seen, for a reader; not needed to understand `check`."""


@dataclass(frozen=True)
class Sample:
    """One sample with its checks; it is kept when all of them pass."""

    record: Mapping[str, Any]
    """In the form of the generator's `kind`, without provenance, which the run adds."""
    verdicts: tuple[Verdict, ...] = ()
    """Of the generator's own checks, in the order in which they ran; the first that fails is the reason."""
    group: str = ""
    """What it shares with others of its item, such as a problem with several solutions; empty: nothing."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures for the report and for difficulty, not for training: plain JSON values."""
    kind: Kind | None = None
    """Form of this record where it is another one than the generator's; None: the generator's."""

    @property
    def reason(self) -> str:
        """Return the name of the first check that it does not pass; empty where it is kept."""
        return next((verdict.check for verdict in self.verdicts if not verdict.passed), "")


def writable(sample: Sample) -> Sample:
    """Return a sample as it is where a line of JSON in UTF-8 can hold it; otherwise one without a record
    that says why not: a model may write half of a character as an escape, or a number without end."""
    try:
        json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        why = "holds half of a surrogate pair, which is no character"
    except (ValueError, RecursionError):  # JSON's own
        why = "holds a number that is none, or is nested too deep"
    else:
        return sample
    return Sample({}, (Verdict("form", False, why),), kind=sample.kind)

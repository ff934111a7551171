"""Items that generators start from, and samples that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["text", "chat", "prompt", "task"]
"""Form of records. text: a document with `text`, for pretraining; chat: `messages` and, with tools, `tools`,
for `sft`; prompt: `prompt` and the fields that a reward needs, for `rl generate`; task: for a tool
environment."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class GeneratorItem:
    """Input for one call of a generator: a document, problem, task, or only a number."""

    id: str
    """Equal in every run over the same input; letters, digits and `:._/-`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    source: str = ""
    """Name of the source or file, for provenance."""
    licence: str = ""
    """Licence of the input; "": not stated."""


@dataclass(frozen=True)
class SampleVerdict:
    """Result of one check on one sample."""

    check: str
    """Check name, equal for all samples that the check rejects."""
    passed: bool
    """Whether the check accepts the sample."""
    detail: str = ""
    """Figures or words for a reader."""


@dataclass(frozen=True)
class GeneratedSample:
    """A sample with the verdicts of the generator's checks; accepted if all verdicts pass."""

    record: Mapping[str, Any]
    """Fields in the form of the generator's `Kind`; the run adds provenance."""
    verdicts: tuple[SampleVerdict, ...] = ()
    """Verdicts in the order of the checks; the first failed verdict gives the reason."""
    group: str = ""
    """Key shared by samples of one item, such as several solutions of a problem; "": no group."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures for readers, not for training: plain JSON values."""

    @property
    def failed_verdict(self) -> SampleVerdict | None:
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)

    @property
    def reason(self) -> str:
        """Return the name of the first failed check; "" for an accepted sample."""
        return self.failed_verdict.check if self.failed_verdict else ""


def replace_unwritable_sample(sample: GeneratedSample) -> GeneratedSample:
    """Return the sample, or an empty sample that fails `form` if UTF-8 JSON cannot hold the record.

    A model may write half a character as an escape, or an infinite number.
    """
    try:
        json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        problem = "holds half of a surrogate pair, which is no character"
    except (ValueError, RecursionError):
        problem = "holds a number that JSON lacks, or nests too deep"
    else:
        return sample
    return GeneratedSample({}, (SampleVerdict("form", False, problem),))

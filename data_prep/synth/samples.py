"""Items and samples of generators, with verdicts."""

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
    """Input for `Generator.make_samples`: a document, problem, task, or only a number."""

    id: str
    """Equal in every run over the same input; letters, digits and `:._/-`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    source: str = ""
    """Source or file name, for provenance."""
    licence: str = ""
    """"": not stated."""


@dataclass(frozen=True)
class SampleVerdict:
    """Result from a check on a sample."""

    check: str
    """Check name, the reason for rejected samples."""
    passed: bool
    """Whether the check accepts the sample."""
    detail: str = ""
    """Figures or words for a reader."""


@dataclass(frozen=True)
class GeneratedSample:
    """A sample with verdicts from the generator's checks; accepted if all verdicts pass."""

    record: Mapping[str, Any]
    """Fields as required by the generator's `Kind`; the run adds `synthetic`."""
    verdicts: tuple[SampleVerdict, ...] = ()
    """Verdicts in check order; the first failed verdict gives the reason."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures for readers, not for training: plain JSON values."""

    @property
    def failed_verdict(self) -> SampleVerdict | None:
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)

    @property
    def reason(self) -> str:
        """Return the first failed check; "" for an accepted sample."""
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

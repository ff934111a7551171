"""Records of a run in its work folder: settings, and a journal of finished items."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.samples import GeneratedSample, GeneratorItem, Kind, SampleVerdict
from megatron_sov.work.progress.journal import iter_records_by_item, work_folder

ANSWERS = "answers.sqlite"
"""File in the output folder with every answer."""


@dataclass(frozen=True)
class SynthRunRecord:
    """Generator, models and settings, which a resumed run must not change.

    A model or an input file may move: identities and digests stand for them."""

    generator: str
    """Generator name."""
    kind: Kind
    model: str
    """Writer's name at its endpoint."""
    identity: str = ""
    """Writer's name in cache keys."""
    judge: str = ""
    """Judge's name at its endpoint."""
    judge_identity: str = ""
    judge_max_tokens: int = 1024
    digests: Mapping[str, str] = field(default_factory=dict)
    """Generator file -> SHA-256."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generator settings, including defaults."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File in addition to the input -> hash."""


@dataclass(frozen=True)
class FinishedItem:
    """A finished item; the fields are keys in the journal record."""

    item: Mapping[str, str]
    """`id`, `source`, `licence`, and `digest`, the content hash when the samples were made."""
    samples: Sequence[GeneratedSample]
    asked: Sequence[str] = ()
    """Request hashes, in order."""
    writers: Sequence[str] = ()
    """Names of the answering models, as stated in answers."""
    unusable: str = ""
    """Reason if all answers were unusable."""

    @classmethod
    def from_json(cls, record: bytes) -> "FinishedItem":
        fields = json.loads(record)
        samples = []
        for sample in fields["samples"]:
            verdicts = tuple(SampleVerdict(**verdict) for verdict in sample["verdicts"])
            samples.append(GeneratedSample(**{**sample, "verdicts": verdicts}))
        return cls(**{**fields, "samples": samples})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode()

    def iter_samples(self) -> Iterator[tuple[str, GeneratedSample]]:
        """Yield (sample id, sample)."""
        return ((f"{self.item['id']}/{number}", sample) for number, sample in enumerate(self.samples))


def describe_item(item: GeneratorItem) -> dict[str, str]:
    """Return `FinishedItem.item`."""
    content = json.dumps([item.fields, item.source, item.licence], sort_keys=True)
    return {"id": item.id, "source": item.source, "licence": item.licence,
            "digest": hashlib.sha256(content.encode()).hexdigest()[:16]}


def read_finished_items(output: Path) -> Iterator[FinishedItem]:
    """Yield the finished items in input order."""
    for _, record in iter_records_by_item(work_folder(output)):
        yield FinishedItem.from_json(record)

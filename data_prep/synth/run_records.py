"""Run files: settings in `OUTPUT/run.json`, and finished items in the work folder's journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.samples import GeneratedSample, GeneratorItem, Kind, SampleVerdict
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.work.progress.journal import JOB, iter_records_by_item, work_folder

RUN, ANSWERS = "run.json", "answers.sqlite"
# a model or an input file may move: identities and digests are compared instead
_FREE_FIELDS = ("kind", "engine", "judge_engine", "inputs")


@dataclass(frozen=True)
class SynthRunRecord:
    """Generator, models and settings for a folder, saved in `run.json`."""

    generator: str
    """Generator name."""
    version: int
    """Generator version."""
    kind: Kind
    model: str
    """Writer's name at its endpoint."""
    engine: str = ""
    """Writer's address or folder."""
    identity: str = ""
    """Writer's name in cache keys."""
    judge: str = ""
    """Judge's name at its endpoint."""
    judge_engine: str = ""
    judge_identity: str = ""
    judge_max_tokens: int = 1024
    digests: Mapping[str, str] = field(default_factory=dict)
    """Generator file -> SHA-256."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generator settings, including defaults."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File in addition to the input -> hash."""
    inputs: Sequence[str] = ()
    """Input files and folders as typed."""

    def get_fixed_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change."""
        # through JSON, so that tuples equal the lists of a saved run.json
        fields: dict[str, Any] = json.loads(format_json(asdict(self)))
        return {name: value for name, value in fields.items() if name not in _FREE_FIELDS}


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
    def from_item(cls, item: GeneratorItem, samples: Sequence[GeneratedSample], asked: Sequence[str] = (),
                  writers: Sequence[str] = (), unusable: str = "") -> FinishedItem:
        return cls({"id": item.id, "source": item.source, "licence": item.licence,
                    "digest": hash_item(item)}, samples, asked, writers, unusable)

    @classmethod
    def from_json(cls, record: bytes) -> FinishedItem:
        fields = json.loads(record)
        samples = [GeneratedSample(**{**sample, "verdicts": tuple(
            SampleVerdict(**verdict) for verdict in sample["verdicts"])}) for sample in fields["samples"]]
        return cls(**{**fields, "samples": samples})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode()

    @property
    def counts(self) -> tuple[int, int, bool]:
        """Return (samples that pass the generator's checks, failed samples, whether answers were useless)."""
        num_failed = sum(sample.failed_verdict is not None for sample in self.samples)
        return len(self.samples) - num_failed, num_failed, bool(self.unusable)

    def iter_samples(self) -> Iterator[tuple[str, GeneratedSample]]:
        """Yield (sample id, sample)."""
        return ((f"{self.item['id']}/{number}", sample) for number, sample in enumerate(self.samples))


def hash_item(item: GeneratorItem) -> str:
    text = json.dumps([item.fields, item.source, item.licence], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_run_record(output: Path) -> SynthRunRecord:
    """Read `run.json`; raises `UserError` if the file is missing or damaged."""
    file = output / RUN
    try:
        fields = json.loads(file.read_bytes().decode(), parse_constant=reject_constant,
                            parse_float=parse_finite)
        # ignores fields from later versions; missing fields from earlier versions get their defaults
        return SynthRunRecord(**{name: fields[name] for name in SynthRunRecord.__dataclass_fields__
                                 if name in fields})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: does not exist; pass a folder that `sov-data synth` wrote") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({first_error_line(e)[:200]}); run the same `sov-data synth` "
                        "again") from None


def check_work_folder(output: Path) -> None:
    """Raise `UserError` if the work folder is missing: without item records all samples would vanish."""
    if not (work_folder(output) / JOB).is_file():
        raise UserError(f"{output}: the records of its items ({work_folder(output)}) are gone; run the same "
                        "`sov-data synth` again: answers are kept, nothing is paid twice")


def read_finished_items(output: Path) -> Iterator[FinishedItem]:
    """Yield each finished item once, in input order."""
    item_ids: set[str] = set()
    for _, record in iter_records_by_item(work_folder(output)):
        item = FinishedItem.from_json(record)
        # two writers may have finished the same item; the first record counts
        if item.item["id"] not in item_ids:
            item_ids.add(item.item["id"])
            yield item

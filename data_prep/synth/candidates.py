"""The files of a run: `OUTPUT/run.json` with its settings, and the journal of finished items, with samples
and verdicts (`megatron_sov.work.progress.journal`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.generator import GeneratedSample, GeneratorItem, Kind, SampleVerdict
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.work.progress.journal import JOB, iter_records_by_item, work_folder

RUN, ANSWERS = "run.json", "answers.sqlite"
# A model may move, and so may names of files: identities and digests decide instead.
_NOT_DECIDING = ("kind", "engine", "judge_engine", "inputs")


@dataclass(frozen=True)
class SynthRunRecord:
    """What made the samples of a folder."""

    generator: str
    """Name on the command line."""
    version: int
    """Of the generator."""
    kind: Kind
    """Form of its records."""
    model: str
    """Of the writer, as its endpoint calls it."""
    engine: str = ""
    """Its address, or its folder."""
    identity: str = ""
    """What stands for it in what answers are kept by."""
    judge: str = ""
    """As `model`, of the judge; empty: none of its own."""
    judge_engine: str = ""
    judge_identity: str = ""
    judge_max_tokens: int = 1024
    """Of a judge's answer."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """File of the generator -> hash of its text, with the prompts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the generator, defaults filled in."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File beside the input -> hash."""
    inputs: Sequence[str] = ()
    """Files and folders that items were made from, as they were given."""

    def deciding(self) -> dict[str, Any]:
        """Return what samples depend on, besides items and answers."""
        # through JSON, as run.json has it: a tuple and the list that is read back must be equal
        told: dict[str, Any] = json.loads(format_json(asdict(self)))
        return {name: value for name, value in told.items() if name not in _NOT_DECIDING}


@dataclass(frozen=True)
class FinishedItem:
    """An item that is done, as the journal holds it."""

    item: Mapping[str, str]
    """Its id, source, licence, and the digest of its content when it was made."""
    samples: Sequence[GeneratedSample]
    """In order."""
    asked: Sequence[str] = ()
    """Hashes of what models were asked for it, in order."""
    writers: Sequence[str] = ()
    """Names of the models that wrote the answers, as their endpoint states them."""
    unusable: str = ""
    """Why no answer was of use; empty: some were."""

    @classmethod
    def of(cls, item: GeneratorItem, samples: Sequence[GeneratedSample], asked: Sequence[str] = (),
           writers: Sequence[str] = (), unusable: str = "") -> FinishedItem:
        """Return an item with what was made of it."""
        return cls({"id": item.id, "source": item.source, "licence": item.licence,
                    "digest": digest_of(item)}, samples, asked, writers, unusable)

    @classmethod
    def read(cls, record: bytes) -> FinishedItem:
        """Return the item of a record of the journal."""
        told = json.loads(record)
        samples = [GeneratedSample(**{**one, "verdicts": tuple(
            SampleVerdict(**verdict) for verdict in one["verdicts"])}) for one in told["samples"]]
        return cls(**{**told, "samples": samples})

    def record(self) -> bytes:
        """Return the item as the journal holds it."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode()

    @property
    def counts(self) -> tuple[int, int, bool]:
        """Return how many samples pass and do not pass their own checks, and whether answers were of no
        use."""
        num_failed = sum(sample.failed is not None for sample in self.samples)
        return len(self.samples) - num_failed, num_failed, bool(self.unusable)

    def numbered(self) -> Iterator[tuple[str, GeneratedSample]]:
        """Yield the samples with their ids."""
        return ((f"{self.item['id']}/{number}", sample) for number, sample in enumerate(self.samples))


def digest_of(item: GeneratorItem) -> str:
    """Return a hash of what an item holds."""
    text = json.dumps([item.fields, item.source, item.licence], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_run(output: Path) -> SynthRunRecord:
    """Return what made the samples of a folder.

    Raises:
        UserError: it is no folder of `sov-data synth`, or its record is damaged.
    """
    file = output / RUN
    try:
        told = json.loads(file.read_bytes().decode(), parse_constant=reject_constant,
                          parse_float=parse_finite)
        # fields of later versions are passed over, and those of earlier ones have their defaults
        return SynthRunRecord(**{name: told[name] for name in SynthRunRecord.__dataclass_fields__
                                 if name in told})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: does not exist; pass a folder that `sov-data synth` wrote") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({first_error_line(e)[:200]}); run the same `sov-data synth` "
                        "again"
                        ) from None


def refuse_without_records(output: Path) -> None:
    """Raise `UserError` where the records of a folder's items are gone: its samples would seem to be none."""
    if not (work_folder(output) / JOB).is_file():
        raise UserError(f"{output}: the records of its items ({work_folder(output)}) are gone; run the same "
                        "`sov-data synth` again: answers are kept, nothing is paid twice")


def read_finished(output: Path) -> Iterator[FinishedItem]:
    """Yield all finished items, in the order of the input, whenever they were finished."""
    seen: set[str] = set()
    for _, record in iter_records_by_item(work_folder(output)):
        found = FinishedItem.read(record)
        # an item may be on record twice, when two writers have made it; the first record counts
        if found.item["id"] not in seen:
            seen.add(found.item["id"])
            yield found

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
from megatron_sov.base.artifacts import to_json
from megatron_sov.base.documents.rows import finite, no_constant
from megatron_sov.base.errors import UserError, first_line
from megatron_sov.work.progress.journal import JOB, records_by_item, work_folder

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
        told: dict[str, Any] = json.loads(to_json(asdict(self)))
        return {name: value for name, value in told.items() if name not in _NOT_DECIDING}


@dataclass(frozen=True)
class Candidate:
    """One sample of a finished item."""

    id: str
    """ITEM/NUMBER, the number counted from 0 among the samples of its item."""
    item: str
    """Id of its item."""
    source: str
    """Where the item comes from."""
    licence: str
    """Of what it was made from; empty: not stated."""
    record: Mapping[str, Any]
    """As the generator made it."""
    verdicts: tuple[SampleVerdict, ...]
    """Of the generator's own checks."""
    group: str = ""
    """What it shares with others of its item."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures that are not for training."""
    asked: tuple[str, ...] = ()
    """Hashes of what models were asked for it."""
    writers: tuple[str, ...] = ()
    """Names of the models that wrote the answers it was made from, as their endpoint states them."""

    @property
    def failed(self) -> SampleVerdict | None:
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)


@dataclass(frozen=True)
class MadeSample:
    """What was made of one item."""

    item: str
    """Its id."""
    samples: tuple[Candidate, ...]
    """In order."""
    unusable: str = ""
    """Why no answer was of use; empty: some were."""
    digest: str = ""
    """Of the item when it was made."""


def record_of(item: GeneratorItem, samples: Sequence[GeneratedSample], asked: Sequence[str],
              unusable: str = "", writers: Sequence[str] = ()) -> bytes:
    """Return the record of an item that is done.

    Args:
        item: the item.
        samples: what was made of it.
        asked: hashes of what models were asked for it, in order.
        unusable: why models' answers were of no use; empty: they were.
        writers: names of the models that wrote the answers.
    """
    said: dict[str, Any] = {
        "item": {"id": item.id, "source": item.source, "licence": item.licence, "digest": digest_of(item)},
        "asked": asked, "writers": writers, "samples": [asdict(sample) for sample in samples],
        "unusable": unusable}
    return json.dumps(said, ensure_ascii=False, allow_nan=False).encode()


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
        told = json.loads(file.read_bytes().decode(), parse_constant=no_constant, parse_float=finite)
        # fields of later versions are passed over, and those of earlier ones have their defaults
        return SynthRunRecord(**{name: told[name] for name in SynthRunRecord.__dataclass_fields__
                                 if name in told})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: does not exist; pass a folder that `sov-data synth` wrote") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({first_line(e)[:200]}); run the same `sov-data synth` again"
                        ) from None


def refuse_without_records(output: Path) -> None:
    """Raise `UserError` where the records of a folder's items are gone: its samples would seem to be none."""
    if not (work_folder(output) / JOB).is_file():
        raise UserError(f"{output}: the records of its items ({work_folder(output)}) are gone; run the same "
                        "`sov-data synth` again: answers are kept, nothing is paid twice")


def read_made(output: Path) -> Iterator[MadeSample]:
    """Yield the samples of all finished items, in the order of the input, whenever they were finished."""
    seen: set[str] = set()
    for _, record in records_by_item(work_folder(output)):
        told = json.loads(record)
        item = told["item"]
        # an item may be on record twice, when two writers have made it; the first record counts
        if item["id"] in seen:
            continue
        seen.add(item["id"])
        yield MadeSample(item["id"], tuple(
            Candidate(f"{item['id']}/{i}", item["id"], item["source"], item["licence"],
                      one["record"],
                      tuple(SampleVerdict(**verdict) for verdict in one["verdicts"]), one["group"],
                      one["notes"], tuple(told["asked"]), tuple(told.get("writers", ())))
            for i, one in enumerate(told["samples"])), told["unusable"], item["digest"])

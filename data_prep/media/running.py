"""`sov-data encode-media`: units are encoded here or by a cluster's array of workers, each with its
share, and joined to an artifact, in the order of the input, with banks that hold each content once."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.libraries import require
from data_prep.media.encoder import STOP, EncodeMediaOptions, MediaSettings
from data_prep.media.units import BAD, ROWS, SUMMARY, MediaUnit, MediaUnitEncoder, bad_medium, plan
from megatron_sov.base.artifacts import (
    MANIFEST, manifest_sha256, new_artifact, read_manifest, refuse_existing)
from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VIDEO
from megatron_sov.base.documents.files import CORPUS_RECORDS, MEDIA_CORPUS
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_nowhere
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, add_options, as_problem, read_options)
from megatron_sov.omni.media.banks import KINDS, BankShape, open_bank
from megatron_sov.work.progress.journal import slurm_folder, work_folder
from megatron_sov.work.progress.progress_bar import work_bar
from megatron_sov.work.progress.resumable import begin_parts, open_parts, part_folder
from megatron_sov.work.submit.arrays import (
    FINISH_CPUS, SharedWork, profile_of, refuse_living, refuse_many_restarts, submit_shares)

BAD_MEDIA = "bad_media.jsonl"
MADE_BY = "sov-data encode-media"
SUFFIXES = (".jsonl", ".ndjson")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EncodeMediaOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(EncodeMediaOptions, typed)
    if args.cluster:
        submit(args, 4 if args.workers is None else args.workers)
    else:
        run_here(args)
    return 0


def run_here(asked: EncodeMediaOptions) -> None:
    """Encode what is not encoded, and write the artifact.

    Raises:
        UserError: records, media, settings or the disk are in the way; what is done is kept.
    """
    units = _ready(asked)
    with open_parts(asked.output, MADE_BY):
        refuse_living(slurm_folder(asked.output))
        _encode(asked, units, shows=True)
        _finish(asked, units)


def submit(asked: EncodeMediaOptions, num_workers: int) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        asked: what was asked for; its paths are on a disk that all nodes see.
        num_workers: jobs of the array.

    Raises:
        UserError: the profile, what was asked for or the cluster are in the way.
    """
    images, sounds = asked.settings.image_tokenizer, asked.settings.audio_tokenizer
    settings = replace(asked.settings, media_root=asked.settings.media_root.absolute(),
                       image_tokenizer=images and images.absolute(),
                       audio_tokenizer=sounds and sounds.absolute())
    asked = replace(asked, output=asked.output.absolute(), settings=settings,
                    input=tuple(path.absolute() for path in asked.input))
    profile = profile_of(asked)
    if (asked.output / MANIFEST).is_file() and not asked.overwrite:
        read_manifest(asked.output, MEDIA_CORPUS)
        print(f"{asked.output}: complete from before")
        return
    units = _ready(asked)
    encoder = MediaUnitEncoder(settings, work_folder(asked.output), asked.threads)
    submit_shares(asked.output, SharedWork(
        "encode", "encode-media", len(units), "units",
        num_done=lambda: sum(map(encoder.is_done, units)), begin=lambda: begin_parts(asked.output, MADE_BY),
        # The number of workers is bound when it is known, the task by the array.
        share=partial(partial, encode_share, asked), finish=partial(finish_run, asked),
        cpus=min(profile.cpus_per_node, asked.threads + 1), gpus=int(settings.device.startswith("cuda")),
        finish_cpus=min(profile.cpus_per_node, FINISH_CPUS)), profile, num_workers)


def encode_share(asked: EncodeMediaOptions, num_workers: int, task: int) -> None:
    """Encode every `num_workers`-th unit, as a job of the array does."""
    refuse_many_restarts("sov-data encode-media", "take more --workers")
    # Every n-th, and not the n-th part: neighbours in a file take about as long.
    _encode(asked, list(plan(_files(asked.input)))[task::num_workers], shows=False)


def finish_run(asked: EncodeMediaOptions, task: int) -> None:
    with open_parts(asked.output, MADE_BY):
        _finish(asked, list(plan(_files(asked.input))))


def _files(inputs: tuple[Path, ...]) -> list[Path]:
    """Return the files of records, in order.

    Raises:
        UserError: there are none.
    """
    found: list[Path] = []
    for path in inputs:
        inside = [path] if path.is_file() else sorted(
            p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not inside:
            raise UserError(f"--input {path}: holds no file of records ({' or '.join(SUFFIXES)}); name one")
        found += inside
    return found


def _ready(asked: EncodeMediaOptions) -> list[MediaUnit]:
    """Return the units, with nothing in the way of making them.

    Raises:
        UserError: settings, paths or the output are.
    """
    p = [*map(as_problem, require("it", "PIL", "soundfile", "scipy", extra="omni")),
         *(SettingsProblem(ProblemCode.FILE, "--input", "does not exist", path, "check the path")
           for path in asked.input if not path.exists())]
    if not asked.settings.media_root.is_dir():
        p.append(SettingsProblem(ProblemCode.FILE, "--media-root", "is no folder", asked.settings.media_root,
                                 "name the one that paths in the records begin from"))
    if p:
        raise SettingsError("", p)
    refuse_existing(asked.output, MEDIA_CORPUS, asked.overwrite)
    refuse_nowhere(asked.output)
    units = list(plan(_files(asked.input)))
    if not units:
        raise UserError("--input: holds no records; write one JSON object per line")
    return units


def _encode(asked: EncodeMediaOptions, units: list[MediaUnit], *, shows: bool) -> None:
    with (MediaUnitEncoder(asked.settings, work_folder(asked.output), asked.threads) as encoder,
          work_bar("encoding", len(units), "unit", shows) as bar):
        for unit in units:
            encoder.encode(unit)
            bar.update(1)


def _finish(asked: EncodeMediaOptions, units: list[MediaUnit]) -> None:
    """Write the artifact of units that are all complete, and print what it holds.

    Raises:
        UserError: chats and documents are mixed, or nothing is left.
    """
    settings, output = asked.settings, asked.output
    banks, work, identity = settings.banks(), work_folder(output), settings.identity()
    with new_artifact(output, MEDIA_CORPUS, overwrite=asked.overwrite) as artifact, ExitStack() as stack:
        def opened(name: str, mode: str) -> Any:
            encoding = None if "b" in mode else "utf-8"
            return stack.enter_context(open(artifact.path / name, mode, encoding=encoding))

        # Units are joined in the order of the input, however many workers made them.
        joined = _JoinedRecords(banks, opened(CORPUS_RECORDS, "w"), opened(BAD_MEDIA, "w"),
                                {kind: opened(f"{kind}.bin", "wb") for kind in banks},
                                settings.bad_media == STOP)
        for unit in units:
            joined.take(unit, part_folder(work, unit.key(identity)))
        # Files are complete before the manifest hashes them.
        stack.close()
        if len(joined.kinds) > 1:
            raise UserError("--input: holds chats and documents; encode them on their own, as `sov-data "
                            "pack` reads one of them at a time")
        if not joined.counts["records"]:
            raise UserError(f"--input: no record is left ({sum(joined.num_bad.values())} are bad: "
                            f"{dict(joined.num_bad)}); mend them")
        for folder in filter(None, (settings.image_tokenizer, settings.audio_tokenizer)):
            artifact.add_input(folder)
        kind = joined.kinds.pop()
        media = {kind: joined.counts[kind] for kind in (IMAGE, AUDIO, VIDEO)}
        artifact.content = {
            "format": kind, "num_records": joined.counts["records"], "num_media": media,
            "num_bad": dict(sorted(joined.num_bad.items())), "codecs": _codecs(settings, joined.codebooks),
            FEATURES: {kind: shape.record() for kind, shape in banks.items()},
            "num_rows": {kind: len(joined.rows[kind]) for kind in banks}}
        artifact.settings = {**vars(settings)}
    print(f"{joined.counts['records']:,} records of kind {kind} with {media[IMAGE]:,} pictures, "
          f"{media[AUDIO]:,} sounds and {media[VIDEO]:,} videos")
    if joined.num_bad:
        listed = ", ".join(f"{count:,} {code}" for code, count in sorted(joined.num_bad.items()))
        print(f"left out: {listed}; see {BAD_MEDIA}")
    print(f"wrote {output}; pack it with `sov-data pack --format {kind} --input {output} ...`")


@dataclass
class _JoinedRecords:
    """The artifact's files as they grow."""

    banks: dict[str, BankShape]
    out: IO[str]
    bad: IO[str]
    files: dict[str, IO[bytes]]
    stops: bool
    """Whether a bad record, which an earlier command has listed, is an end."""
    rows: dict[str, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    """Bank -> content of a record -> its row."""
    counts: Counter[str] = field(default_factory=Counter)
    num_bad: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    codebooks: dict[str, int] = field(default_factory=dict)

    def take(self, unit: MediaUnit, folder: Path) -> None:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.counts.update(summary["counts"])
        self.kinds.update(summary["kinds"])
        self.codebooks |= summary["codebooks"]
        with open(folder / BAD, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                # Lines are kept relative to the unit, which may also stand in another file.
                row = {"file": str(unit.file), **row, "line": row["line"] + unit.first_line}
                if self.stops:
                    raise bad_medium(unit.file, row["line"], row["medium"], row["reason"])
                self.num_bad[row["code"]] += 1
                self.bad.write(json.dumps(row, ensure_ascii=False) + "\n")
        places = self._banks(folder)
        with open(folder / CORPUS_RECORDS, encoding="utf-8") as f:
            for line in f:
                record = json.loads(line)
                for kind, rows in record[FEATURES].items():
                    # From rows of the unit's banks to rows of the joined ones.
                    record[FEATURES][kind] = [[places[kind][row], used] for row, used in rows]
                self.out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _banks(self, folder: Path) -> dict[str, list[int]]:
        """Append the records that are new; returns the row that each of the unit's records has."""
        keys = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        places: dict[str, list[int]] = {}
        for kind, shape in self.banks.items():
            records: np.ndarray | None = None
            known, places[kind] = self.rows[kind], []
            for number, key in enumerate(keys[kind]):
                if key not in known:
                    records = open_bank(folder / f"{kind}.bin", shape) if records is None else records
                    known[key] = len(known)
                    self.files[kind].write(records[number].tobytes())
                places[kind].append(known[key])
        return places


def _codecs(settings: MediaSettings, codebooks: dict[str, int]) -> dict[str, dict[str, Any]]:
    found = {}
    for kind, folder in ((IMAGE, settings.image_tokenizer), (AUDIO, settings.audio_tokenizer)):
        if folder is not None:
            found[kind] = {"manifest_sha256": manifest_sha256(folder),
                           "codec": read_manifest(folder).content.get("codec"),
                           "codebook_size": codebooks.get(kind)}
    return found

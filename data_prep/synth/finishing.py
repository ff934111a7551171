"""The end of a run: kept samples become an ordinary source, the others are written with the reason.

May be called at any time, also while items are left; no file that it writes is needed to go on.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.candidates import (
    ANSWERS, FinishedItem, SynthRunRecord, read_finished, read_run, refuse_without_records)
from data_prep.synth.checks.judging import JudgedSample, judge_samples
from data_prep.synth.checks.settings import check_problems
from data_prep.tags import SYNTHESIS, find_source_artifact
from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, create_file, format_json, translate_disk_errors, write_atomically)
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES, REJECTED_SAMPLES
from megatron_sov.base.documents.rows import format_json_line
from megatron_sov.base.errors import UserError, stop_check
from megatron_sov.base.settings import SettingsError

ANSWERED = "200"
_SUMS = """SELECT outcome, count(*), sum(input_tokens), sum(output_tokens), sum(wall_s)
FROM requests GROUP BY outcome ORDER BY outcome"""
SUMMARY = "summary.json"
PROVENANCE = "synthetic"
"""Field of a kept record that says how it was made."""


def costs_of(output: Path) -> dict[str, Any]:
    """Return sums over all requests of a folder, failed ones too: how many were sent and answered, status or
    fault -> requests, tokens read and written, and seconds, one request after the other.

    Raises:
        UserError: a file of answers is damaged.
    """
    outcomes: Counter[str] = Counter()
    sums = [0, 0, 0.0]
    if (file := output / ANSWERS).is_file():
        try:
            with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True,
                                                    timeout=60)) as connection:
                for outcome, num, *more in connection.execute(_SUMS):
                    outcomes[str(outcome)] += num
                    sums = [total + (one or 0) for total, one in zip(sums, more, strict=True)]
        except sqlite3.Error as e:
            raise UserError(f"{file}: cannot be read ({e}); restore it from a copy, or delete it: then its "
                            "answers are asked, and paid, again") from None
    return {"num_requests": outcomes.total(), "num_answered": outcomes[ANSWERED],
            "outcomes": dict(sorted(outcomes.items())),
            **dict(zip(("input_tokens", "output_tokens", "seconds"), sums, strict=True))}


def finish(output: Path, checks: Path | None = None, workers: int = 1, *, is_complete: bool = True) -> None:
    """Check the samples of a folder, and write the samples that stay, those that do not, and the figures.

    Args:
        output: folder of the run.
        checks: file of steps; None: the packaged steps of the generator or of its kind of record.
        workers: processes of the checks; the result does not depend on it.
        is_complete: whether all items are done; only then there is a manifest.

    Raises:
        UserError: settings, a file of the folder, an input or the disk are in the way.
    """
    run = read_run(output)
    refuse_without_records(output)
    if problems := check_problems(checks):
        raise SettingsError("checks", problems)
    stop_check()
    with translate_disk_errors(output):
        # from here on files change: a kill must not leave a manifest that speaks for them
        (output / MANIFEST).unlink(missing_ok=True)
        judged = judge_samples(output, run, checks, workers)
        tally = FinishingTally()
        _write_rows(output, run, judged, tally)
        summary = {
            "format": 1, "generator": run.generator, "version": run.version, "kind": run.kind,
            "model": run.model, "judge": run.judge, "settings": dict(run.settings),
            "is_complete": is_complete, **tally.to_dict(), "steps": list(judged.steps),
            "costs": costs_of(output)}
        write_atomically(output / SUMMARY, format_json(summary))
        # last of all, since it hashes the files and says that they are whole
        if is_complete:
            _write_manifest(output, run, checks, tally)
    samples = RecordAccount(tally.num_samples, tally.num_kept, tally.rejected, "samples")
    print(f"{output}: {samples.describe()}\n  {output / ACCEPTED_SAMPLES}, {output / REJECTED_SAMPLES}, "
          f"{output / SUMMARY}")


@dataclass
class FinishingTally:
    """Counts of samples."""

    num_items: int = 0
    """Items that are done."""
    num_unusable: int = 0
    """Items whose answers were of no use."""
    num_samples: int = 0
    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> samples."""
    licences: Counter[str] = field(default_factory=Counter)
    """Licence of what a kept sample was made from -> samples; empty: not stated."""
    sources: Counter[str] = field(default_factory=Counter)
    """Source that a kept sample was made from -> samples."""
    models: Counter[str] = field(default_factory=Counter)
    """Name of the model that wrote a sample, kept or rejected -> samples."""

    def to_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "num_unusable_items": self.num_unusable,
                "num_samples": self.num_samples, "num_kept": self.num_kept,
                "num_rejected": self.rejected.total(),
                "rejected": dict(sorted(self.rejected.items(), key=lambda one: (-one[1], one[0]))),
                "licences": dict(sorted(self.licences.items())),
                "sources": dict(sorted(self.sources.items())), "models": dict(sorted(self.models.items()))}


def _write_rows(output: Path, run: SynthRunRecord, judged: JudgedSample, tally: FinishingTally) -> None:
    """Write kept and rejected samples; both files get their names when both are on the disk."""
    # temporary files of a run that was killed
    for leftover in (*output.glob(f".{ACCEPTED_SAMPLES}.tmp-*"), *output.glob(f".{REJECTED_SAMPLES}.tmp-*")):
        leftover.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        kept, rejected = (stack.enter_context(open(stack.enter_context(create_file(output / name)), "wb"))
                          for name in (ACCEPTED_SAMPLES, REJECTED_SAMPLES))
        for item in read_finished(output):
            tally.num_items += 1
            tally.num_unusable += bool(item.unusable)
            for id_, sample in item.numbered():
                tally.num_samples += 1
                tally.models[writers_of(run, item)] += 1
                origin = {
                    "sample": id_, "generator": run.generator, "version": run.version,
                    "model": writers_of(run, item), "judge": run.judge, "item": item.item["id"],
                    "source": item.item["source"], "licence": item.item["licence"], "group": sample.group,
                    "asked": list(item.asked), "notes": dict(sample.notes)}
                # the steps have seen only samples that pass their own checks
                later = None if sample.failed else judged.verdict(run.kind, id_, sample)
                if failed := sample.failed or later:
                    tally.rejected[failed.check] += 1
                    verdicts = [*sample.verdicts, *([later] if later else [])]
                    rejected.write(format_json_line({
                        "reason": failed.check, "detail": failed.detail, "record": sample.record,
                        "verdicts": [vars(verdict) for verdict in verdicts], PROVENANCE: origin}))
                    continue
                tally.num_kept += 1
                tally.licences[item.item["licence"]] += 1
                tally.sources[item.item["source"]] += 1
                # only texts are changed here: other kinds with a changed text are rejected
                changed = {"text": judged.changed[id_]} if id_ in judged.changed else {}
                kept.write(format_json_line({"id": id_, **sample.record, **changed, PROVENANCE: origin}))
        # bytes first, then names: a power cut must not leave a named file without its end
        for rows in (kept, rejected):
            rows.flush()
            os.fsync(rows.fileno())


def writers_of(run: SynthRunRecord, item: FinishedItem) -> str:
    """Return the names of the models that wrote the samples of an item, separated by commas."""
    return ", ".join(item.writers) or run.model


def _write_manifest(output: Path, run: SynthRunRecord, checks: Path | None, tally: FinishingTally) -> None:
    writer = ArtifactWriter(output, SYNTHESIS)
    # answers stay out of the hashes: a later command adds to them
    writer.excluded_names = frozenset(path.name for path in output.iterdir()
                                      if path.name not in (ACCEPTED_SAMPLES, REJECTED_SAMPLES, SUMMARY))
    writer.content = {
        "generator": run.generator, "generator_version": run.version, "kind": run.kind, "model": run.model,
        "judge": run.judge, "num_kept": tally.num_kept, "num_rejected": tally.rejected.total(),
        "licences": dict(sorted(tally.licences.items())), "sources": dict(sorted(tally.sources.items())),
        "models": dict(sorted(tally.models.items()))}
    writer.settings = {"generator": dict(run.settings), "checks": checks}
    for artifact in dict.fromkeys(filter(None, map(find_source_artifact, map(Path, run.inputs)))):
        writer.add_input(artifact)
    writer.complete()

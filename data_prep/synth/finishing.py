"""The end of a run: samples that stay become an ordinary source, the others keep the reason why they do not.

May be called at any time, also while items are left; nothing that it writes is needed to go on.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.synth.candidates import (
    ANSWERS, Candidate, SynthRunRecord, read_made, read_run, refuse_without_records)
from data_prep.synth.checks.judging import JudgedSample, judge_samples
from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.generator import SampleVerdict
from data_prep.tags import SYNTHESIS, artifact_of
from megatron_sov.base.artifacts import MANIFEST, ArtifactWriter, atomic_write, disk_errors, new_file, to_json
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import KEPT, REJECTED
from megatron_sov.base.documents.rows import json_line
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, problems_of

ANSWERED = "200"
_SUMS = """SELECT outcome, count(*), sum(input_tokens), sum(output_tokens), sum(cost), sum(wall_s)
FROM requests GROUP BY outcome ORDER BY outcome"""
_EACH = ("num_requests", "input_tokens", "output_tokens", "cost", "seconds")
"""What each kept sample has cost."""
SUMMARY = "summary.json"
PROVENANCE = "synthetic"
"""Field of a kept record that says how it was made."""


# What the samples of a folder have cost: requests, tokens, seconds and money, by the answers' record.


def costs_of(output: Path) -> dict[str, Any]:
    """Return sums over all requests on record in a folder, those that failed too: how many were sent and
    answered, status (or what happened instead) -> requests, tokens that were read and written, cost in the
    currency of the prices, and seconds, one request after the other.

    Raises:
        UserError: a file of answers is damaged.
    """
    outcomes: Counter[str] = Counter()
    sums = [0, 0, 0.0, 0.0]
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
            **dict(zip(("input_tokens", "output_tokens", "cost", "seconds"), sums, strict=True))}


def finish(output: Path, settings: CheckSettings, workers: int = 1, *, is_complete: bool = True) -> None:
    """Check the samples of a folder, and write the samples that stay, those that do not, and the figures.

    Args:
        output: folder of the run.
        settings: how they are checked.
        workers: processes of the checks; the result does not depend on it.
        is_complete: whether all items are done; only then there is a manifest.

    Raises:
        UserError: settings, a file of the folder, an input or the disk are in the way.
    """
    run = read_run(output)
    refuse_without_records(output)
    if problems := problems_of(settings):
        raise SettingsError("checks", problems)
    with disk_errors(output):
        # from here on files change: a kill must not leave a manifest that speaks for them
        (output / MANIFEST).unlink(missing_ok=True)
        judged = judge_samples(output, run, settings, workers)
        tally = FinishingTally()
        _write_rows(output, run, judged, tally)
        costs = costs_of(output)
        summary = {
            "format": 1, "generator": run.generator, "version": run.version, "kind": run.kind,
            "model": run.model, "judge": run.judge, "templates": dict(run.templates),
            "settings": dict(run.settings), "is_complete": is_complete, **tally.to_dict(),
            "steps": list(judged.steps), "costs": costs,
            "per_kept": {name.removeprefix("num_"): costs[name] / tally.num_kept for name in _EACH}
            if tally.num_kept else None}
        atomic_write(output / SUMMARY, to_json(summary))
        # last of all, since it hashes the files and says that they are whole
        if is_complete:
            _write_manifest(output, run, settings, tally)
    print(_summary_lines(output, tally))


@dataclass
class FinishingTally:
    """Counts of samples."""

    num_items: int = 0
    """Items that are done."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Why no answer was of use -> items."""
    num_samples: int = 0
    num_kept: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    """File of kept records -> records."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> samples."""
    licences: Counter[str] = field(default_factory=Counter)
    """Licence of what a kept sample was made from -> samples; empty: not stated."""
    sources: Counter[str] = field(default_factory=Counter)
    """Source that a kept sample was made from -> samples."""
    models: Counter[str] = field(default_factory=Counter)
    """Name of the model that wrote a sample, kept or rejected -> samples."""

    def count(self, sample: Candidate, reason: str, file: str, model: str) -> None:
        """Count a sample of a model.

        Args:
            sample: the sample.
            reason: why it is rejected; empty: it is kept.
            file: of kept records of its kind.
            model: name of the model that wrote it.
        """
        self.num_samples += 1
        self.models[model] += 1
        if reason:
            self.rejected[reason] += 1
            return
        self.num_kept += 1
        self.kept[file] += 1
        self.licences[sample.licence] += 1
        self.sources[sample.source] += 1

    def to_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "num_unusable_items": self.unusable.total(),
                "num_samples": self.num_samples, "num_kept": self.num_kept,
                "num_rejected": self.rejected.total(),
                "kept": dict(sorted(self.kept.items())),
                "rejected": dict(sorted(self.rejected.items(), key=lambda one: (-one[1], one[0]))),
                "licences": dict(sorted(self.licences.items())),
                "sources": dict(sorted(self.sources.items())), "models": dict(sorted(self.models.items()))}


def kept_file(run: SynthRunRecord, kind: str) -> str:
    """Return the name of the file that kept records of a kind stand in."""
    return KEPT if kind == run.kind else f"{Path(KEPT).stem}-{kind}.jsonl"


def _write_rows(output: Path, run: SynthRunRecord, judged: JudgedSample, tally: FinishingTally) -> None:
    """Write kept and rejected samples; the files get their names together, when all are on the disk."""
    # temporary files of a run that was killed
    for leftover in [*output.glob(f".{Path(KEPT).stem}*.tmp-*"), *output.glob(f".{REJECTED}.tmp-*")]:
        leftover.unlink(missing_ok=True)
    files: dict[str, IO[bytes]] = {}
    with contextlib.ExitStack() as stack:
        def rows_of(name: str) -> IO[bytes]:
            if name not in files:
                files[name] = stack.enter_context(open(stack.enter_context(new_file(output / name)), "wb"))
            return files[name]

        for name in (KEPT, REJECTED):  # be they empty
            rows_of(name)
        for made in read_made(output, run):
            tally.num_items += 1
            if made.unusable:
                tally.unusable[made.unusable] += 1
            for sample in made.samples:
                # the steps have seen only samples that pass their own checks
                later = None if sample.failed else judged.verdict(sample)
                verdicts = [*sample.verdicts, *([later] if later else [])]
                failed = sample.failed or later
                file = kept_file(run, sample.kind)
                tally.count(sample, failed.check if failed else "", file, writers_of(run, sample))
                row = _rejected_row(run, sample, verdicts) if failed else _kept_row(run, sample, judged)
                rows_of(REJECTED if failed else file).write(json_line(row))
        # bytes first, then names: a power cut must not leave a named file without its end
        for rows in files.values():
            rows.flush()
            os.fsync(rows.fileno())
    for stale in output.glob(f"{Path(KEPT).stem}-*.jsonl"):  # of an earlier state
        if stale.name not in files:
            stale.unlink()


def _kept_row(run: SynthRunRecord, sample: Candidate, judged: JudgedSample) -> dict[str, Any]:
    # only texts get here: other kinds whose text a step changed are rejected
    changed = {"text": judged.changed[sample.id]} if sample.id in judged.changed else {}
    return {"id": sample.id, **sample.record, **changed, PROVENANCE: _origin(run, sample)}


def _rejected_row(run: SynthRunRecord, sample: Candidate, verdicts: Sequence[SampleVerdict]
                  ) -> dict[str, Any]:
    failed = next(verdict for verdict in verdicts if not verdict.passed)
    return {"reason": failed.check, "detail": failed.detail, "kind": sample.kind, "record": sample.record,
            "verdicts": [vars(verdict) for verdict in verdicts], PROVENANCE: _origin(run, sample)}


def writers_of(run: SynthRunRecord, sample: Candidate) -> str:
    """Return the names of the models that wrote a sample, separated by commas."""
    return ", ".join(sample.writers) or run.model


def _origin(run: SynthRunRecord, sample: Candidate) -> dict[str, Any]:
    return {"sample": sample.id, "generator": run.generator, "version": run.version,
            "model": writers_of(run, sample), "judge": run.judge, "templates": dict(run.templates),
            "item": sample.item, "source": sample.source, "licence": sample.licence, "group": sample.group,
            "asked": list(sample.asked)}


def _write_manifest(output: Path, run: SynthRunRecord, settings: CheckSettings,
                    tally: FinishingTally) -> None:
    writer = ArtifactWriter(output, SYNTHESIS)
    # answers stay out of the hashes: a later command adds to them
    ours = {KEPT, REJECTED, SUMMARY, *tally.kept}
    writer.leave_out = frozenset(path.name for path in output.iterdir() if path.name not in ours)
    writer.content = {
        "generator": run.generator, "generator_version": run.version, "kind": run.kind, "model": run.model,
        "judge": run.judge, "num_kept": tally.num_kept, "num_rejected": tally.rejected.total(),
        "kept": dict(sorted(tally.kept.items())), "licences": dict(sorted(tally.licences.items())),
        "sources": dict(sorted(tally.sources.items())), "models": dict(sorted(tally.models.items()))}
    writer.settings = {"generator": dict(run.settings), "templates": dict(run.templates), "checks": settings}
    for artifact in _artifacts(map(Path, run.inputs)):
        writer.add_input(artifact)
    writer.complete()


def _artifacts(inputs: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(filter(None, map(artifact_of, inputs))))


def _summary_lines(output: Path, tally: FinishingTally) -> str:
    samples = RecordAccount(tally.num_samples, tally.num_kept, tally.rejected, "samples")
    lines = [f"{output}: {samples.describe()}",
             f"  {output / KEPT}, {output / REJECTED}, {output / SUMMARY}"]
    return "\n".join(lines)

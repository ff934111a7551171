"""The end of a run: samples that stay become an ordinary source, the others keep the reason why they do not.

May be called at any time, also while items are left; nothing that it writes is needed to go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from data_prep.provenance import SYNTHESIS, artifact_of
from data_prep.synth.candidates import Candidate, RunRecord, read_made, read_run
from data_prep.synth.checks.judging import Judged, judge_samples
from data_prep.synth.checks.labels import Comparison, described, gate_of, read_labels
from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.checks.texts import SAMPLES, NoSample, texts_of
from data_prep.synth.costs import costs_of
from data_prep.synth.page import write_page
from data_prep.synth.sample import Verdict
from data_prep.synth.shown import Shown
from megatron_sov.artifacts import MANIFEST, ArtifactWriter, atomic_write, disk_errors, fsync_path, to_json
from megatron_sov.documents.synthesis import KEPT, REJECTED
from megatron_sov.errors import ExitCode
from megatron_sov.settings import SettingsError, problems_of

SUMMARY = "summary.json"
PROVENANCE = "synthetic"
"""Field of a kept record that says how it was made."""


def finish(output: Path, settings: CheckSettings, workers: int = 1, *, is_complete: bool = True) -> ExitCode:
    """Check the samples of a folder, and write what stays, what does not, the figures and the page.

    Args:
        output: folder of the run.
        settings: how they are checked.
        workers: processes of the checks; the result does not depend on it.
        is_complete: whether all items are done; only then there is a manifest.

    Returns:
        `GATE_FAILED` where checks and judge agree with people less than asked.

    Raises:
        UserError: settings, a file of the folder, an input or the disk are in the way.
    """
    run = read_run(output)
    if problems := problems_of(settings):
        raise SettingsError("checks", problems)
    with disk_errors(output):
        (output / MANIFEST).unlink(missing_ok=True)
        judged = judge_samples(output, run, settings, workers)
        comparison = None if settings.labels is None else Comparison(read_labels(settings.labels))
        tally, shown = Tally(), Shown()
        _write_rows(output, run, judged, tally, shown, comparison)
        agreements = [] if comparison is None else comparison.agreements()
        passed = True
        if settings.min_kappa is not None:
            kappa = gate_of(agreements).kappa
            passed = kappa is not None and kappa >= settings.min_kappa
        costs = costs_of(output)
        summary = {
            "format": 1, "generator": run.generator, "version": run.version, "kind": run.kind,
            "model": run.model, "judge": run.judge, "templates": dict(run.templates),
            "settings": dict(run.settings), "is_complete": is_complete, **tally.to_dict(),
            "steps": list(judged.steps), "costs": dataclasses.asdict(costs),
            "per_kept": costs.per(tally.num_kept), "agreement": list(described(agreements)),
            "min_kappa": settings.min_kappa, "gate_passed": None if settings.min_kappa is None else passed,
            "shown": shown.to_list()}
        atomic_write(output / SUMMARY, to_json(summary))
        write_page(output)
        if is_complete:
            _write_manifest(output, run, settings, tally)
    print(_told(output, tally, settings, passed))
    return ExitCode.OK if passed else ExitCode.GATE_FAILED


@dataclasses.dataclass
class Tally:
    """Counts of samples."""

    num_items: int = 0
    """Items that are done."""
    unusable: Counter[str] = dataclasses.field(default_factory=Counter)
    """Why no answer was of use -> items."""
    num_samples: int = 0
    num_kept: int = 0
    kept: Counter[str] = dataclasses.field(default_factory=Counter)
    """File of kept records -> records."""
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    """Reason -> samples."""
    licences: Counter[str] = dataclasses.field(default_factory=Counter)
    """Licence of what a kept sample was made from -> samples; empty: not stated."""
    sources: Counter[str] = dataclasses.field(default_factory=Counter)
    """Source that a kept sample was made from -> samples."""

    def count(self, sample: Candidate, reason: str, file: str) -> None:
        """Take a sample; `reason`: empty where it stays."""
        self.num_samples += 1
        if reason:
            self.rejected[reason] += 1
            return
        self.num_kept += 1
        self.kept[file] += 1
        self.licences[sample.licence] += 1
        self.sources[sample.source] += 1

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"num_items": self.num_items,
                "num_unusable_items": self.unusable.total(),
                "num_samples": self.num_samples,
                "num_kept": self.num_kept, "num_rejected": self.rejected.total(),
                "kept": dict(sorted(self.kept.items())),
                "rejected": dict(sorted(self.rejected.items(), key=lambda one: (-one[1], one[0]))),
                "licences": dict(sorted(self.licences.items())),
                "sources": dict(sorted(self.sources.items()))}


def kept_file(run: RunRecord, kind: str) -> str:
    """Return the name of the file that kept records of a kind stand in."""
    return KEPT if kind == run.kind else f"{Path(KEPT).stem}-{kind}.jsonl"


def _write_rows(output: Path, run: RunRecord, judged: Judged, tally: Tally, shown: Shown,
                comparison: Comparison | None) -> None:
    """Write kept and rejected samples, each file complete or as it was."""
    with ExitStack() as stack:
        files = _Files(output, stack)
        files.write(KEPT)
        files.write(REJECTED)
        for made in read_made(output, run):
            tally.num_items += 1
            if made.unusable:
                tally.unusable[made.unusable] += 1
            for sample in made.samples:
                later = None if sample.failed else judged.verdict(sample)
                verdicts = [*sample.verdicts, *([later] if later else [])]
                failed = sample.failed or later
                file = kept_file(run, sample.kind)
                tally.count(sample, failed.check if failed else "", file)
                shown.take(sample, failed)
                if comparison is not None:
                    comparison.add(sample.id, _text(sample), verdicts)
                files.write(REJECTED if failed else file,
                            _rejected(run, sample, verdicts) if failed else _kept(run, sample, judged))
        files.publish()


class _Files:
    """Files of JSON lines that get their names together, when all are written."""

    def __init__(self, output: Path, stack: ExitStack) -> None:
        self._output, self._stack = output, stack
        self._files: dict[str, tuple[Path, IO[bytes]]] = {}
        for leftover in [*output.glob(f".{Path(KEPT).stem}*.tmp-*"), *output.glob(f".{REJECTED}.tmp-*")]:
            leftover.unlink(missing_ok=True)

    def write(self, name: str, row: Mapping[str, Any] | None = None) -> None:
        if name not in self._files:
            temporary = self._output / f".{name}.tmp-{os.getpid()}"
            self._stack.callback(temporary.unlink, missing_ok=True)
            self._files[name] = temporary, self._stack.enter_context(temporary.open("wb"))
        if row is not None:
            self._files[name][1].write(_line(row))

    def publish(self) -> None:
        for temporary, file in self._files.values():
            file.close()
            fsync_path(temporary)
        for name, (temporary, _) in self._files.items():
            os.replace(temporary, self._output / name)
        for stale in self._output.glob(f"{Path(KEPT).stem}-*.jsonl"):  # of an earlier state
            if stale.name not in self._files:
                stale.unlink()


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair; such a record is never kept
        return json.dumps(row).encode() + b"\n"


def _kept(run: RunRecord, sample: Candidate, judged: Judged) -> dict[str, Any]:
    changed = {"text": judged.changed[sample.id]} if sample.id in judged.changed else {}
    return {"id": sample.id, **sample.record, **changed, PROVENANCE: _origin(run, sample)}


def _rejected(run: RunRecord, sample: Candidate, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    failed = next(verdict for verdict in verdicts if not verdict.passed)
    return {"reason": failed.check, "detail": failed.detail, "kind": sample.kind, "record": sample.record,
            "verdicts": [vars(verdict) for verdict in verdicts], PROVENANCE: _origin(run, sample)}


def _origin(run: RunRecord, sample: Candidate) -> dict[str, Any]:
    return {"sample": sample.id, "generator": run.generator, "version": run.version, "model": run.model,
            "judge": run.judge, "templates": dict(run.templates), "item": sample.item,
            "source": sample.source, "licence": sample.licence, "group": sample.group,
            "asked": list(sample.asked)}


def _text(sample: Candidate) -> str:
    try:
        return texts_of(sample.kind, sample.record)[SAMPLES]
    except NoSample:
        return ""


def _write_manifest(output: Path, run: RunRecord, settings: CheckSettings, tally: Tally) -> None:
    writer = ArtifactWriter(output, SYNTHESIS)
    ours = {KEPT, REJECTED, SUMMARY, "report.html", *tally.kept}
    writer.leave_out = frozenset(path.name for path in output.iterdir() if path.name not in ours)
    writer.content = {
        "generator": run.generator, "generator_version": run.version, "kind": run.kind, "model": run.model,
        "judge": run.judge, "num_kept": tally.num_kept, "num_rejected": tally.rejected.total(),
        "kept": dict(sorted(tally.kept.items())), "licences": dict(sorted(tally.licences.items())),
        "sources": dict(sorted(tally.sources.items()))}
    writer.settings = {"generator": dict(run.settings), "templates": dict(run.templates), "checks": settings}
    for artifact in _artifacts(map(Path, run.inputs)):
        writer.add_input(artifact)
    writer.complete()


def _artifacts(inputs: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(filter(None, map(artifact_of, inputs))))


def _told(output: Path, tally: Tally, settings: CheckSettings, passed: bool) -> str:
    worst = ", ".join(f"{num:,} {reason}" for reason, num in tally.rejected.most_common(3))
    lines = [f"{output}: {tally.num_kept:,} of {tally.num_samples:,} samples kept"
             + (f"; mostly rejected for: {worst}" if worst else ""),
             f"  {output / KEPT}, {output / REJECTED}, {output / 'report.html'}"]
    if not passed:
        lines.append(f"  agreement with {settings.labels} is below --min-kappa {settings.min_kappa:g}")
    return "\n".join(lines)

"""Finish a run: write accepted samples as a source, rejected samples with reasons, and counts.

May run at any time, also with unfinished items; resuming needs none of the written files.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.checks.judging import JudgedSamples, judge_samples
from data_prep.synth.run_records import ANSWERS, FinishedItem, SynthRunRecord, read_finished_items
from data_prep.synth.samples import GeneratedSample
from data_prep.synth.synth import SynthOptions
from data_prep.tags import SYNTHESIS, find_source_artifact
from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, create_file, format_json, translate_disk_errors, write_atomically)
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES, REJECTED_SAMPLES
from megatron_sov.base.documents.rows import format_json_line
from megatron_sov.work.endpoints.cache import EndpointCache

SUMMARY = "summary.json"
PROVENANCE = "synthetic"
"""Field in an accepted record with generator, models and origin."""


def finish(run: SynthRunRecord, options: SynthOptions, output: Path, *, is_complete: bool = True) -> None:
    """Judge the finished items' samples, and write `kept.jsonl`, `rejected.jsonl`, `summary.json` and the
    manifest.

    Args:
        run: generator, models and settings.
        options: `input`, `checks` and `workers`; the result does not depend on the number of workers.
        output: folder of the run.
        is_complete: whether all items are finished; only then a manifest is written.

    Raises:
        UserError: a file in the folder, an input or the disk is wrong.
    """
    with translate_disk_errors(output):
        # from here on files change: after a kill, no manifest may describe them
        (output / MANIFEST).unlink(missing_ok=True)
        judged = judge_samples(output, run, options)
        tally = SampleTally()
        _write_samples(output, run, judged, tally)
        with contextlib.closing(EndpointCache(output / ANSWERS)) as cache:
            costs = cache.summarize_requests()
        summary = {
            "format": 1, "generator": run.generator, "kind": run.kind, "model": run.model, "judge": run.judge,
            "settings": dict(run.settings), "is_complete": is_complete, **tally.to_dict(),
            "steps": list(judged.steps), "costs": costs}
        write_atomically(output / SUMMARY, format_json(summary))
        # last, because the manifest hashes the files above
        if is_complete:
            _write_manifest(output, run, options, tally)
    account = RecordAccount(tally.num_samples, tally.num_kept, tally.rejected, "samples")
    print(f"{output}: {account.describe()}\n  {output / ACCEPTED_SAMPLES}, {output / REJECTED_SAMPLES}, "
          f"{output / SUMMARY}")
    if tally.num_unusable:
        print(f"  {tally.num_unusable:,} items had no usable answer")


@dataclass
class SampleTally:

    num_items: int = 0
    """Finished items."""
    num_unusable: int = 0
    """Items without a usable answer."""
    num_samples: int = 0
    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> samples."""
    licences: Counter[str] = field(default_factory=Counter)
    """Input licence -> accepted samples; "": not stated."""
    sources: Counter[str] = field(default_factory=Counter)
    """Input source -> accepted samples."""
    models: Counter[str] = field(default_factory=Counter)
    """Writing model -> accepted and rejected samples."""

    def to_dict(self) -> dict[str, Any]:
        by_count = sorted(self.rejected.items(), key=lambda entry: (-entry[1], entry[0]))
        return {"num_items": self.num_items, "num_unusable_items": self.num_unusable,
                "num_samples": self.num_samples, "num_kept": self.num_kept,
                "num_rejected": self.rejected.total(), "rejected": dict(by_count),
                "licences": dict(sorted(self.licences.items())),
                "sources": dict(sorted(self.sources.items())), "models": dict(sorted(self.models.items()))}


def _write_samples(output: Path, run: SynthRunRecord, judged: JudgedSamples, tally: SampleTally) -> None:
    """Write accepted and rejected samples; both files get their names when both are on disk."""
    # temporary files of a killed run
    for leftover in (*output.glob(f".{ACCEPTED_SAMPLES}.tmp-*"), *output.glob(f".{REJECTED_SAMPLES}.tmp-*")):
        leftover.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        accepted, rejected = (stack.enter_context(open(stack.enter_context(create_file(output / name)), "wb"))
                              for name in (ACCEPTED_SAMPLES, REJECTED_SAMPLES))
        for item in read_finished_items(output):
            tally.num_items += 1
            tally.num_unusable += bool(item.unusable)
            for sample_id, sample in item.iter_samples():
                tally.num_samples += 1
                provenance = _build_provenance(run, item, sample_id, sample)
                tally.models[provenance["model"]] += 1
                # steps judge only samples that pass the generator's checks
                step_verdict = judged.rejected.get(sample_id)
                if failed := sample.failed_verdict or step_verdict:
                    tally.rejected[failed.check] += 1
                    verdicts = [*sample.verdicts, *([step_verdict] if step_verdict else [])]
                    rejected.write(format_json_line({
                        "reason": failed.check, "detail": failed.detail, "record": sample.record,
                        "verdicts": [vars(verdict) for verdict in verdicts], PROVENANCE: provenance}))
                    continue
                tally.num_kept += 1
                tally.licences[item.item["licence"]] += 1
                tally.sources[item.item["source"]] += 1
                accepted.write(format_json_line({"id": sample_id, **sample.record, PROVENANCE: provenance}))
        # content before names: after a power cut, no named file may lack its end
        for file in (accepted, rejected):
            file.flush()
            os.fsync(file.fileno())


def _build_provenance(run: SynthRunRecord, item: FinishedItem, sample_id: str, sample: GeneratedSample
                      ) -> dict[str, Any]:
    return {"sample": sample_id, "generator": run.generator,
            "model": ", ".join(item.writers) or run.model, "judge": run.judge, "item": item.item["id"],
            "source": item.item["source"], "licence": item.item["licence"],
            "asked": list(item.asked), "notes": dict(sample.notes)}


def _write_manifest(output: Path, run: SynthRunRecord, options: SynthOptions, tally: SampleTally) -> None:
    writer = ArtifactWriter(output, SYNTHESIS)
    # without answers.sqlite, to which a later command adds answers
    writer.excluded_names = frozenset(path.name for path in output.iterdir()
                                      if path.name not in (ACCEPTED_SAMPLES, REJECTED_SAMPLES, SUMMARY))
    writer.content = {
        "generator": run.generator, "kind": run.kind, "model": run.model, "judge": run.judge,
        "num_kept": tally.num_kept, "num_rejected": tally.rejected.total(),
        "licences": dict(sorted(tally.licences.items())), "sources": dict(sorted(tally.sources.items())),
        "models": dict(sorted(tally.models.items()))}
    writer.settings = {**asdict(run), "checks": options.checks}
    for artifact in dict.fromkeys(filter(None, map(find_source_artifact, options.input))):
        writer.add_input(artifact)
    writer.complete()

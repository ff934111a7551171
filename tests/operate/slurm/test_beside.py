"""Evaluation beside training as a job of its own, on a real Slurm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.commands.operate.logs import log_files
from megatron_sov.model.config import apply_settings
from megatron_sov.train.side_jobs.evaluations import Evaluations


@pytest.mark.deep  # side_jobs/test_evaluations.py has it without Slurm
@pytest.mark.distributed
def test_a_job_brings_the_figures_of_an_export(site: Path, cluster: Any, until: Callable[..., None],
                                               hf_models: dict[str, Path], token_shards: Path) -> None:
    run = site / "run"
    shutil.copytree(hf_models["solar_open"], run / "exports/step-10")
    (run / "exports/step-10/manifest.json").write_text("{}")
    config = apply_settings(recipes.get("tiny-solar-open"), [
        f"data.paths={json.dumps({str(token_shards): 1.0})}", 'data.phases=[{"name": "main", "seq_len": 64}]',
        "data.heldout_tokens=128", "train.export_every_checkpoints=1", 'evaluate.background.tasks=["ppl"]',
        "evaluate.background.where=slurm", f"evaluate.background.cluster={site / 'site.yaml'}"])
    events: list[dict[str, Any]] = []
    beside = Evaluations(run, config, lambda name, **fields: events.append({"event": name, **fields}))
    # no job begins before the partition is up: else a quick one ends before its submission is seen to
    cluster.run("scontrol", "update", "partitionname=batch", "state=down")
    try:
        beside.wait()
        # the job is in Slurm's hands, and nobody waits for it
        assert events == [] and len(beside._submitted) == 1
    finally:
        cluster.run("scontrol", "update", "partitionname=batch", "state=up")

    def told() -> bool:
        beside.poll(now=True)
        return bool(events)

    until(told, 600, "the figures of the job")
    assert [(e["event"], e["step"], e.get("error")) for e in events] == [("evaluation", 10, None)]
    figures = json.loads((run / "evaluations/step-10.ppl.json").read_text())
    assert set(figures) == {"first", "second"} and all(row["bits_per_byte"] > 0 for row in figures.values())
    labels = [file.label for file in log_files(run)]
    assert labels[0].startswith("step-10.ppl job ") and f"{labels[0]} rank 0" in labels

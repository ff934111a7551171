"""Which runs trained one model."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.obs.events import EventLog
from megatron_sov.report.lineage import of_one_model
from megatron_sov.report.run_data import read_run


def names(*paths: Path) -> tuple[list[str], list[str]]:
    """Return the runs of the one model, and those of others."""
    own, others = of_one_model([read_run(path) for path in paths])
    return [run.name for run in own], [run.name for run in others]


def test_a_run_of_another_size_or_architecture_is_apart(runs: list[Path], toy: Path) -> None:
    assert names(runs[0], toy, runs[1]) == (["pretrain", "extend"], ["retrieval"])


def test_the_first_run_says_which_model_it_is(runs: list[Path], toy: Path) -> None:
    assert names(toy, *runs) == (["retrieval"], ["pretrain", "extend"])


def test_a_run_that_has_not_recorded_its_size_is_kept_with_the_first(runs: list[Path],
                                                                     tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("step", step=1, loss=1.0)
    for order in ((runs[0], tmp_path), (tmp_path, runs[0])):
        assert names(*order)[1] == []

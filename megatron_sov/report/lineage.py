"""Which runs of a report trained one model.  A report tells of one; what others reached is not its doing."""

from __future__ import annotations

from megatron_sov.report.run_data import Run


def of_one_model(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs that trained the first run's model, and those that trained another one.

    A run's start records no ancestor, so that a model is known by what no stage changes: its architecture
    and its number of parameters.  What a run does not record speaks neither for nor against it.
    """
    known = [{"family": run.setting("model", "family"), "params": run.start("num_params")} for run in runs]
    same = [all(one[what] in (None, known[0][what]) or known[0][what] is None for what in one)
            for one in known]
    return ([run for run, own in zip(runs, same, strict=True) if own],
            [run for run, own in zip(runs, same, strict=True) if not own])

"""Chains of stages from one file: each starts when those before it are complete,
and a failed one stops what follows."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.clusters import client, cluster
from megatron_sov.errors import UserError
from megatron_sov.obs.events import read_events
from megatron_sov.slurm import submission
from megatron_sov.slurm.chain_file import ChainConfig, ChainStage, names, read_chain, work_folder
from megatron_sov.slurm.history import ATTEMPTS
from megatron_sov.slurm.script import READY_ROOT, Ready
from megatron_sov.slurm.stages import Commands, SubmitOptions, check_inputs


@dataclass(frozen=True)
class Link:
    """A stage of a chain, with its scripts."""

    name: str
    after: tuple[str, ...]
    prepared: submission.Prepared

    @property
    def complete(self) -> bool:
        """Whether its completion manifest exists."""
        return self.prepared.work.done.is_file()


@dataclass(frozen=True)
class Submitted:
    """What became of the submissions of a chain: CHAIN.yaml.jobs.json."""

    time_s: float = 0.0
    """When the last one was made."""
    jobs: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> its jobs, of which the last is the one that others wait for."""


def run(chain: str, options: SubmitOptions, commands: Commands) -> int:
    """Submit a chain, or what is not complete of it; returns 0.

    Everything is checked before the first job is submitted.

    Args:
        chain: name of one that comes with the package, or a file.
        options: the command line's.
        commands: the parsers of the stages' commands.

    Raises:
        UserError: the file, a stage, Slurm or the state of an earlier submission does not allow it.
    """
    links = links_of(chain, options, commands)
    if options.dry_run:
        for link in links:
            state = "complete" if link.complete else "to be submitted"
            print(f"# {link.name}: {state}, after {', '.join(link.after) or 'nothing'}")
            submission.show(link.prepared)
        return 0
    promised: set[Path] = set()
    for link in links:
        check_inputs(link.prepared.work, promised)
        promised.add(link.prepared.work.target)
    state_file = _state_file(chain)
    before = Submitted(**json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {})
    if before.jobs:
        living = client.states([number for numbers in before.jobs.values() for number in numbers])
        for link in links:
            print(f"{link.name}: {_state(link, before, living)}")
        if living:
            raise UserError(f"{chain}: jobs of it wait or run; wait for them, "
                            f"or `scancel {' '.join(living)}`")
        if not options.continue_chain:
            raise UserError(f"{chain}: was submitted before; pass --continue to submit what is not complete")
    open_links = [link for link in links if not link.complete]
    for link in open_links:
        submission.check(link.prepared)
    _submit(open_links, before, state_file)
    if not open_links:
        print(f"{chain}: every stage is complete")
    return 0


def _state_file(chain: str) -> Path:
    """Return where it stands what was submitted: beside a user's file, in $WORK for a chain that
    comes with the package."""
    return Path(work_folder(), f"{chain}.yaml.jobs.json") if chain in names() else Path(f"{chain}.jobs.json")


def _submit(links: list[Link], before: Submitted, state_file: Path) -> None:
    """Submit in order; all or nothing."""
    now = Submitted(time.time(), {})
    try:
        for link in links:
            after = [now.jobs[name][-1] for name in link.after if name in now.jobs]
            now.jobs[link.name] = jobs = submission.submit(link.prepared, after)
            print(f"{link.name}: submitted as job {' and '.join(jobs)}"
                  + (f", after job {' and '.join(after)}" if after else ""))
        if links:
            atomic_write(state_file, to_json(Submitted(now.time_s, before.jobs | now.jobs)))
    except UserError:
        client.cancel([number for numbers in now.jobs.values() for number in numbers])
        raise


def _state(link: Link, before: Submitted, living: dict[str, str]) -> str:
    """Return how a stage of an earlier submission stands, in words."""
    if link.complete:
        return "complete"
    numbers = before.jobs.get(link.name, [])
    for number in numbers:
        if number in living:
            return f"job {number} is {living[number].lower()}"
    records = link.prepared.work.records
    ends = [r for file in (records / ATTEMPTS, *sorted(records.glob(f"task-*/{ATTEMPTS}")))
            for r in read_events(file)
            if r["event"] == "end" and r["time_s"] >= before.time_s and r["outcome"] != "complete"]
    if ends:
        return f"not complete, its job ended by: {ends[-1]['outcome']}, {ends[-1]['reason']}"
    if said := [argv for number in numbers if (argv := submission.last_words(records, number))]:
        return f"not complete, its job ended before it began its work: {said[-1]}"
    return (f"not complete, its job {' and '.join(numbers) or '(none)'} never began: "
            "an earlier stage failed, or it was cancelled")


def links_of(chain: str, options: SubmitOptions, commands: Commands) -> list[Link]:
    """Return the stages of a chain with their scripts; nothing is written and Slurm is not asked.

    Raises:
        UserError: something about them does not fit.
    """
    config = read_chain(chain)
    links: list[Link] = []
    for number, stage in enumerate(config.stages):
        before = (config.stages[number - 1].label,) if number else ()
        after = before if stage.after is None else stage.after
        needs = tuple(link.prepared.work.done for link in links if link.name in after)
        ready = _ready(chain, number, stage, options) if options.scripts is not None else None
        try:
            request = _request(config, stage, options, needs, ready)
            links.append(Link(stage.label, after, submission.prepare(request, commands)))
        except UserError as e:
            raise UserError(f"{chain}: stage {stage.label}: {e}") from None
    targets = Counter((link.prepared.work.records, link.prepared.work.stage) for link in links)
    if same := [records for (records, _), count in targets.items() if count > 1]:
        raise UserError(f"{chain}: two stages write to {same[0].parent}; give each a folder of its own")
    return links


def _request(config: ChainConfig, stage: ChainStage, options: SubmitOptions, needs: tuple[Path, ...],
             ready: Ready | None) -> submission.Request:
    """Return what a stage of a chain asks for.

    Args:
        config: its chain.
        stage: what the file says.
        options: the command line's.
        needs: completion manifests of the stages before it.
        ready: what its ready script says of itself.
    """
    chosen = stage.cluster or options.cluster or config.cluster
    if not chosen:
        raise UserError("names no cluster; add a line `cluster: PROFILE` to the file, or pass --cluster")
    profile = cluster.load(chosen, account=options.account, partition=options.partition,
                           needs_account=ready is None)
    return submission.Request(
        stage.stage, stage.argv(READY_ROOT if ready else None), profile, stage.nodes, stage.min_nodes or None,
        cluster.settings_by_nodes(stage.nodes_set), stage.array, needs,
        stage.time_limit or options.time_limit, ready, chosen)


def _ready(chain: str, number: int, stage: ChainStage, options: SubmitOptions) -> Ready:
    assert options.scripts is not None, chain
    name = f"{Path(chain).stem}-{stage.label}"
    chosen = f" --cluster {options.cluster}" if options.cluster else ""
    return Ready(name, options.scripts / f"{number + 1:02}-{stage.label}.sbatch",
                 f"megatron-sov submit chain {chain}{chosen} --scripts {options.scripts}", stage.note)

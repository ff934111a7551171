"""Chains of stages from one file: each starts when those before it are complete, and a failed one stops what follows."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.commands.submit import settings_by_nodes
from megatron_sov.errors import UserError, nearest
from megatron_sov.obs.events import read_events
from megatron_sov.slurm import client, cluster, submission
from megatron_sov.slurm.history import ATTEMPTS
from megatron_sov.slurm.stages import check_inputs
from megatron_sov.slurm.yaml_file import read_text, read_yaml

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ChainStage:
    """One stage of a chain file."""

    __pydantic_config__ = STRICT
    stage: str
    """Which stage."""
    arguments: str
    """What follows its command, quoted as in a shell."""
    name: str = ""
    """Its name in the chain; empty: the stage's."""
    after: tuple[str, ...] | None = None
    """Names of the stages that have to be complete; null: the one before."""
    cluster: str = ""
    """Profile; empty: the chain's."""
    nodes: int = 1
    """Nodes of a training stage."""
    min_nodes: int = 0
    """Fewest nodes to go on with; 0: all."""
    nodes_set: tuple[str, ...] = ()
    """N:key=value: settings that change when there are N nodes."""
    array: int = 0
    """data pack: tasks that share the inputs."""
    time_limit: str | None = None
    """Time limit instead of the profile's."""


@dataclass(frozen=True)
class ChainConfig:
    """A chain file."""

    __pydantic_config__ = STRICT
    stages: tuple[ChainStage, ...]
    """In order."""
    cluster: str = ""
    """Profile of all stages; empty: --cluster."""


@dataclass(frozen=True)
class Options:
    """What the command line says for all stages of a chain; None: what the file or the profile says."""

    cluster: str | None = None
    account: str | None = None
    partition: str | None = None
    time_limit: str | None = None


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


def run(file: Path, options: Options, *, resume: bool, dry_run: bool) -> int:
    """Submit a chain, or what is not complete of it; returns 0.

    Everything is checked before the first job is submitted.

    Raises:
        UserError: the file, a stage, Slurm or the state of an earlier submission does not allow it.
    """
    links = _links(file, options)
    state_file = file.with_name(f"{file.name}.jobs.json")
    before = Submitted(**json.loads(state_file.read_text())) if state_file.is_file() else Submitted()
    if dry_run:
        for link in links:
            state = "complete" if link.complete else "to be submitted"
            print(f"# {link.name}: {state}, after {', '.join(link.after) or 'nothing'}")
            submission.show(link.prepared)
        return 0
    promised: set[Path] = set()
    for link in links:
        check_inputs(link.prepared.work, promised)
        promised.add(link.prepared.work.target)
    if before.jobs:
        living = client.states([number for numbers in before.jobs.values() for number in numbers])
        for link in links:
            print(f"{link.name}: {_state(link, before, living)}")
        if living:
            raise UserError(f"{file}: jobs of it wait or run; wait for them, or `scancel {' '.join(living)}`")
        if not resume:
            raise UserError(f"{file}: was submitted before; pass --continue to submit what is not complete")
    open_links = [link for link in links if not link.complete]
    for link in open_links:
        submission.check(link.prepared)
    _submit(open_links, before, state_file)
    if not open_links:
        print(f"{file}: every stage is complete")
    return 0


def _submit(links: list[Link], before: Submitted, state_file: Path) -> None:
    """Submit in order; all or nothing."""
    now = Submitted(time.time(), {})
    try:
        for link in links:
            after = [now.jobs[name][-1] for name in link.after if name in now.jobs]
            now.jobs[link.name] = jobs = submission.submit(link.prepared, after)
            print(f"{link.name}: submitted as job {' and '.join(jobs)}" + (f", after job {' and '.join(after)}" if after else ""))
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
    ends = [r for file in (records / ATTEMPTS, *sorted(records.glob(f"task-*/{ATTEMPTS}"))) for r in read_events(file)
            if r["event"] == "end" and r["time_s"] >= before.time_s and r["outcome"] != "complete"]
    if ends:
        return f"not complete, its job ended by: {ends[-1]['outcome']}, {ends[-1]['reason']}"
    if said := [argv for number in numbers if (argv := submission.last_words(records, number))]:
        return f"not complete, its job ended before it began its work: {said[-1]}"
    return f"not complete, its job {' and '.join(numbers) or '(none)'} never began: an earlier stage failed, or it was cancelled"


def _links(file: Path, options: Options) -> list[Link]:
    """Return the stages of a file with their scripts.

    Raises:
        UserError: something about them does not fit.
    """
    config = read_chain(file)
    names = [s.name or s.stage for s in config.stages]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file}: {twice[0]!r} names two stages; give one of them another `name`")
    links: list[Link] = []
    for number, stage in enumerate(config.stages):
        after = stage.after if stage.after is not None else tuple(names[number - 1:number])
        for name in after:
            if name not in names[:number]:
                raise UserError(f"{file}: {names[number]} comes after {name!r}, which is no stage before it"
                                f"{nearest(name, names[:number])}")
        chosen = stage.cluster or options.cluster or config.cluster
        if not chosen:
            raise UserError(f"{file}: names no cluster; add a line `cluster: PROFILE`, or pass --cluster")
        needs = tuple(link.prepared.work.done for link in links if link.name in after)
        try:
            links.append(Link(names[number], after, _prepared(stage, chosen, options, needs)))
        except UserError as e:
            raise UserError(f"{file}: stage {names[number]}: {e}") from None
    targets = Counter((link.prepared.work.records, link.prepared.work.stage) for link in links)
    if same := [records for (records, _), count in targets.items() if count > 1]:
        raise UserError(f"{file}: two stages write to {same[0].parent}; give each a folder of its own")
    return links


def _prepared(stage: ChainStage, chosen: str, options: Options, needs: tuple[Path, ...]) -> submission.Prepared:
    """Return the scripts of one stage.

    Args:
        stage: what the file says.
        chosen: name of its profile.
        options: the command line's.
        needs: completion manifests of the stages before it.
    """
    try:
        argv = tuple(shlex.split(stage.arguments, comments=True))
    except ValueError as e:
        raise UserError(f"arguments = {stage.arguments!r}: cannot be read as a shell would ({e}); mend its quotes") from None
    profile = cluster.load(chosen, account=options.account, partition=options.partition)
    return submission.prepare(submission.Request(
        stage.stage, argv, profile, stage.nodes, stage.min_nodes or None, settings_by_nodes(list(stage.nodes_set)), stage.array,
        needs, stage.time_limit or options.time_limit))


def read_chain(file: Path) -> ChainConfig:
    """Read a chain file.

    Raises:
        UserError: it is not there, is no YAML, or has other fields.
    """
    if not file.is_file():
        raise UserError(f"{file}: does not exist; a chain is a YAML file with `stages` (docs/slurm.md)")
    config = read_yaml(str(file), read_text(str(file), file), ChainConfig, (ChainStage,), "chain")
    if not config.stages:
        raise UserError(f"{file}: has no stages")
    return config

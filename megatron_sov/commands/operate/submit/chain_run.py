"""Runs `megatron-sov submit chain`. A stage starts after its predecessors are complete. --scripts writes the
stages' scripts for `sbatch` instead."""

import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.base.artifacts import format_json, translate_disk_errors, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.submit.chain import (
    ChainConfig, ChainStage, get_work_folder, list_chains, read_chain)
from megatron_sov.commands.operate.submit.job_summary import check_data, show_dry_run
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.operate.slurm import submission
from megatron_sov.operate.slurm.stages import SubmitOptions, check_inputs
from megatron_sov.operate.slurm.submission import READY_ROOT, ReadySubmission
from megatron_sov.runs.folder import ATTEMPTS, read_last_log_line
from megatron_sov.runs.obs.events import read_events
from megatron_sov.work.clusters import client, cluster


@dataclass(frozen=True)
class ChainLink:
    """A stage in a chain with its job scripts."""

    name: str
    after: tuple[str, ...]
    prepared: submission.PreparedStage

    @property
    def complete(self) -> bool:
        """Whether the stage's completion manifest exists."""
        return self.prepared.work.completion.is_file()


@dataclass(frozen=True)
class ChainSubmission:
    """Submissions of a chain: content of CHAIN.yaml.jobs.json."""

    time_s: float = 0.0
    """Unix time of the last submission."""
    jobs: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> job ids; successors wait for the last job."""


def run_chain(chain: str, options: SubmitOptions) -> None:
    """Submit a chain, or write its scripts and print their paths."""
    if options.scripts is None:
        submit_chain(chain, options)
        return
    for script in write_scripts(chain, options.scripts, options):
        print(script)


def submit_chain(chain: str, options: SubmitOptions) -> None:
    """Submit a chain's incomplete stages, after checks of all stages. Raises `UserError`: an invalid file or
    stage, a problem with Slurm, or jobs of an earlier submission."""
    links = prepare_links(chain, options)
    if options.dry_run:
        for link in links:
            state = "complete" if link.complete else "to be submitted"
            print(f"# {link.name}: {state}, after {', '.join(link.after) or 'nothing'}")
            show_dry_run(link.prepared)
        return
    # in order: a stage may read outputs of earlier stages
    promised: set[Path] = set()
    for link in links:
        check_inputs(link.prepared.work, promised)
        promised.add(link.prepared.work.target)
    state_file = _get_state_file(chain)
    earlier = ChainSubmission()
    if state_file.is_file():
        earlier = ChainSubmission(**json.loads(state_file.read_text(encoding="utf-8")))
    if earlier.jobs:
        active = client.read_active_states(list(itertools.chain.from_iterable(earlier.jobs.values())))
        for link in links:
            print(f"{link.name}: {_describe_state(link, earlier, active)}")
        # a second job of a stage would write to the same folders
        if active:
            raise UserError(f"{chain}: its jobs are waiting or running; wait until they end, or `scancel "
                            f"{' '.join(active)}`")
        if not options.continue_chain:
            raise UserError(f"{chain}: was submitted before; pass --continue to submit the incomplete stages")
    open_links = [link for link in links if not link.complete]
    # ask Slurm about every stage before the first submission
    for link in open_links:
        submission.check_with_slurm(link.prepared)
    _submit_links(open_links, earlier, state_file)
    if not open_links:
        print(f"{chain}: every stage is complete")


def _get_state_file(chain: str) -> Path:
    """Return the path of CHAIN.yaml.jobs.json: next to a user's chain file, in $WORK for a packaged chain."""
    if chain in list_chains():
        return Path(get_work_folder(), f"{chain}.yaml.jobs.json")
    return Path(f"{chain}.jobs.json")


def _submit_links(links: list[ChainLink], earlier: ChainSubmission, state_file: Path) -> None:
    """Submit all stages in order and record their jobs in addition to the `earlier` ones; cancel all new jobs
    if one submission fails."""
    submission_s, jobs = time.time(), dict[str, list[str]]()
    try:
        for link in links:
            # a complete stage has no job
            awaited_jobs = [jobs[name][-1] for name in link.after if name in jobs]
            jobs[link.name] = submission.submit_jobs(link.prepared, awaited_jobs)
            print(f"{link.name}: submitted as job {' and '.join(jobs[link.name])}"
                  + (f", after job {' and '.join(awaited_jobs)}" if awaited_jobs else ""))
        # inside `try`: --continue needs the file, so a failed write cancels the jobs
        if links:
            write_atomically(state_file, format_json(ChainSubmission(submission_s, earlier.jobs | jobs)))
    except UserError:
        # successors of a missing job would wait forever
        client.cancel_jobs(list(itertools.chain.from_iterable(jobs.values())))
        raise


def _describe_state(link: ChainLink, earlier: ChainSubmission, active: dict[str, str]) -> str:
    """Describe a stage's state in an earlier submission; `active`: job number -> Slurm's state."""
    if link.complete:
        return "complete"
    numbers = earlier.jobs.get(link.name, [])
    for number in numbers:
        if number in active:
            return f"job {number} is {active[number].lower()}"
    records = link.prepared.work.records
    # the records also contain attempts from earlier submissions
    attempt_files = (records / ATTEMPTS, *sorted(records.glob(f"task-*/{ATTEMPTS}")))
    events = itertools.chain.from_iterable(map(read_events, attempt_files))
    failures = [event for event in events if event["event"] == "end"
                and event["time_s"] >= earlier.time_s and event["outcome"] != "complete"]
    if failures:
        return f"not complete, its job ended by: {failures[-1]['outcome']}, {failures[-1]['reason']}"
    if lines := [line for number in numbers if (line := read_last_log_line(records, number))]:
        return f"not complete, its job ended before it started work: {lines[-1]}"
    return (f"not complete, its job {' and '.join(numbers) or '(none)'} never began: "
            "an earlier stage failed, or it was cancelled")


def prepare_links(chain: str, options: SubmitOptions) -> list[ChainLink]:
    """Build the job scripts for a chain's stages, without writing a file or querying Slurm. Raises
    `UserError`: an invalid stage, or two stages with the same folder."""
    config = read_chain(chain)
    links: list[ChainLink] = []
    for number, stage in enumerate(config.stages):
        # without `after`, a stage follows the one above it in the file
        stage_above = (config.stages[number - 1].label,) if number else ()
        after = stage_above if stage.after is None else stage.after
        needs = tuple(link.prepared.work.completion for link in links if link.name in after)
        ready = _describe_script(chain, number, stage, options) if options.scripts is not None else None
        try:
            request = _build_request(config, stage, options, needs, ready)
            prepared = submission.prepare_stage(request, STAGE_PARSERS, check_data)
            links.append(ChainLink(stage.label, after, prepared))
        except UserError as e:
            raise UserError(f"{chain}: stage {stage.label}: {e}") from None
    # a stage's folder contains its records and logs
    targets = Counter((link.prepared.work.records, link.prepared.work.stage) for link in links)
    if same := [records for (records, _), count in targets.items() if count > 1]:
        raise UserError(f"{chain}: two stages write to {same[0].parent}; use separate folders")
    return links


def _build_request(config: ChainConfig, stage: ChainStage, options: SubmitOptions, needs: tuple[Path, ...],
                   ready: ReadySubmission | None) -> submission.SubmitRequest:
    """Build a stage's request. `needs`: completion manifests of its predecessors."""
    chosen = stage.cluster or options.cluster or config.cluster
    if not chosen:
        raise UserError("has no cluster; add a line `cluster: PROFILE` to the file, or pass --cluster")
    profile = cluster.load_profile(chosen, account=options.account, partition=options.partition,
                                   needs_account=ready is None)
    return submission.SubmitRequest(
        stage.stage, stage.argv(READY_ROOT if ready else None), profile, stage.nodes, stage.min_nodes or None,
        cluster.parse_node_settings(stage.nodes_set), stage.array, needs,
        stage.time_limit or options.time_limit, ready, chosen, stage.engine_nodes)


def _describe_script(chain: str, number: int, stage: ChainStage, options: SubmitOptions) -> ReadySubmission:
    assert options.scripts is not None, chain
    name = f"{Path(chain).stem}-{stage.label}"
    chosen = f" --cluster {options.cluster}" if options.cluster else ""
    return ReadySubmission(name, options.scripts / f"{number + 1:02}-{stage.label}.sbatch",
                           f"megatron-sov submit chain {chain}{chosen} --scripts {options.scripts}",
                           stage.note)


def write_scripts(chain: str, folder: Path, options: SubmitOptions) -> list[Path]:
    """Write a chain's scripts and return their paths in submission order. Raises `UserError`: an invalid
    chain, or an existing script, which a user may have edited."""
    links = prepare_links(chain, options)
    scripts = {job.script: text for link in links
               for job, text in zip(link.prepared.jobs, link.prepared.texts, strict=True)}
    if existing := [path for path in scripts if path.exists()]:
        raise UserError(f"{existing[0]}: already exists and may have been edited; delete it, or choose "
                        "another --scripts folder")
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in scripts.items():
        write_atomically(path, text)
    return list(scripts)

"""`megatron-sov submit STAGE --cluster P --nodes N ARGUMENTS...` and `megatron-sov submit chain CHAIN`.

A chain is several stages from one YAML file, of the package by name or a user's own by path: each starts when
those before it are complete, and a failed one stops what follows; or their scripts as files for `sbatch`,
which any folder and any Python with the package will do for.  `$WORK` in the arguments of a stage stands for
the folder that the variable of that name holds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_sov.base.artifacts import format_json, translate_disk_errors, write_atomically
from megatron_sov.base.command_line import HelpFormatter, Parser
from megatron_sov.base.errors import ExitCode, Fix, UserError, suggest_name
from megatron_sov.base.settings import (
    AtLeastOne, NotNegativeInt, add_options, parse_settings_yaml, read_options, read_settings_text)
from megatron_sov.commands import COMMANDS as PROGRAMS
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.model.config import apply_settings
from megatron_sov.operate.slurm import submission
from megatron_sov.operate.slurm.stages import STAGES, Commands, SubmitOptions, check_inputs, check_stage
from megatron_sov.operate.slurm.submission import READY_ROOT, ReadySubmission
from megatron_sov.runs.folder import ATTEMPTS, read_last_log_line
from megatron_sov.runs.obs.events import read_events
from megatron_sov.work.clusters import client, cluster

WORK = re.compile(r"\$WORK\b|\$\{WORK\}")


@dataclass(frozen=True)
class ChainStage:
    """One stage of a chain file."""

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
    nodes: AtLeastOne = 1
    """Nodes of a training stage."""
    min_nodes: NotNegativeInt = 0
    """Fewest nodes to go on with; 0: all."""
    nodes_set: tuple[str, ...] = ()
    """N:key=value: settings that change when there are N nodes."""
    engine_nodes: NotNegativeInt = 0
    """rl-run --engine vllm: nodes beside these, for engine servers alone."""
    array: NotNegativeInt = 0
    """data pack: tasks that share the inputs."""
    time_limit: str | None = None
    """Time limit instead of the profile's."""
    note: str = ""
    """What people should know before they submit its ready script."""

    @property
    def label(self) -> str:
        """Its name in the chain."""
        return self.name or self.stage

    def argv(self, work: str | None) -> tuple[str, ...]:
        """Return the arguments as a shell would split them.

        Args:
            work: what `$WORK` stands for; None: what the environment says.

        Raises:
            UserError: quotes do not match, or $WORK is used and not set.
        """
        try:
            argv = shlex.split(self.arguments, comments=True)
        except ValueError as e:
            raise UserError(f"arguments = {self.arguments!r}: cannot be read as a shell would ({e}); "
                            "mend its quotes") from None
        return tuple(WORK.sub(lambda found: get_work_folder() if work is None else work, word)
                     for word in argv)


@dataclass(frozen=True)
class ChainConfig:
    """A chain file."""

    stages: tuple[ChainStage, ...]
    """In order."""
    cluster: str = ""
    """Profile of all stages; empty: --cluster."""
    description: str = ""
    """One line for people."""


def get_work_folder() -> str:
    """Return the folder of $WORK, absolute.

    Raises:
        UserError: it is not set.
    """
    if not os.environ.get("WORK"):
        raise UserError("$WORK is not set; export WORK=FOLDER, a folder on a disk that all nodes see")
    return str(Path(os.environ["WORK"]).absolute())


def list_chains() -> list[str]:
    """Return the names of the chains that come with the package."""
    return [*cluster.list_packaged_files("chains")]


def read_chain(name: str) -> ChainConfig:
    """Read a chain: one that comes with the package, or a YAML file of the user's.

    Raises:
        UserError: it is not there, is no YAML, has other fields, or stages that cannot be
            one after the other.
    """
    if name in list_chains():
        text = cluster.list_packaged_files("chains")[name].read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_settings_text(Path(name), name)
    else:
        known = list_chains()
        raise UserError(f"{name}: does not exist{suggest_name(name, known)} (chains: {', '.join(known)}; "
                        "your own: a YAML file with `stages`, docs/slurm.md)")
    config = parse_settings_yaml(ChainConfig, text, name, rules=False)
    if not config.stages:
        raise UserError(f"{name}: has no stages")
    labels = [stage.label for stage in config.stages]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"{name}: {twice[0]!r} names two stages; give one of them another `name`")
    for number, stage in enumerate(config.stages):
        # only stages above it: so a chain can have no circle
        for before in stage.after or ():
            if before not in labels[:number]:
                raise UserError(f"{name}: {stage.label} comes after {before!r}, which is no stage before it"
                                f"{suggest_name(before, labels[:number])}")
    return config


@dataclass(frozen=True)
class ChainLink:
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


def submit_chain(chain: str, options: SubmitOptions, commands: Commands) -> int:
    """Submit a chain, or what is not complete of it; returns 0.

    Everything is checked before the first job is submitted.

    Args:
        chain: name of one that comes with the package, or a file.
        options: the command line's.
        commands: the parsers of the stages' commands.

    Raises:
        UserError: the file, a stage, Slurm or the state of an earlier submission does not allow it.
    """
    from megatron_sov.commands.operate.job_summary import show_dry_run  # imports numpy

    links = prepare_links(chain, options, commands)
    if options.dry_run:
        for link in links:
            state = "complete" if link.complete else "to be submitted"
            print(f"# {link.name}: {state}, after {', '.join(link.after) or 'nothing'}")
            show_dry_run(link.prepared)
        return 0
    # in order: a stage may read what an earlier one will have made
    promised: set[Path] = set()
    for link in links:
        check_inputs(link.prepared.work, promised)
        promised.add(link.prepared.work.target)
    state_file = _state_file(chain)
    before = Submitted(**json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {})
    if before.jobs:
        living = client.read_active_states([number for numbers in before.jobs.values() for number in numbers])
        for link in links:
            print(f"{link.name}: {_state(link, before, living)}")
        # a second copy of a job would write into the same folders
        if living:
            raise UserError(f"{chain}: jobs of it wait or run; wait for them, "
                            f"or `scancel {' '.join(living)}`")
        if not options.continue_chain:
            raise UserError(f"{chain}: was submitted before; pass --continue to submit what is not complete")
    open_links = [link for link in links if not link.complete]
    # all are asked about before the first is submitted
    for link in open_links:
        submission.check(link.prepared)
    _submit(open_links, before, state_file)
    if not open_links:
        print(f"{chain}: every stage is complete")
    return 0


def _state_file(chain: str) -> Path:
    """Return where it stands what was submitted: beside a user's file, in $WORK for a chain that
    comes with the package."""
    if chain in list_chains():
        return Path(get_work_folder(), f"{chain}.yaml.jobs.json")
    return Path(f"{chain}.jobs.json")


def _submit(links: list[ChainLink], before: Submitted, state_file: Path) -> None:
    """Submit in order; all or nothing."""
    now = Submitted(time.time(), {})
    try:
        for link in links:
            # a stage that is complete from before is no job to wait for
            after = [now.jobs[name][-1] for name in link.after if name in now.jobs]
            now.jobs[link.name] = jobs = submission.submit(link.prepared, after)
            print(f"{link.name}: submitted as job {' and '.join(jobs)}"
                  + (f", after job {' and '.join(after)}" if after else ""))
        # in the `try`: jobs that no file names would be lost to --continue, so they are cancelled
        if links:
            write_atomically(state_file, format_json(Submitted(now.time_s, before.jobs | now.jobs)))
    except UserError:
        # jobs that wait for one that was never submitted would wait for ever
        client.cancel_jobs([number for numbers in now.jobs.values() for number in numbers])
        raise


def _state(link: ChainLink, before: Submitted, living: dict[str, str]) -> str:
    """Return how a stage of an earlier submission stands, in words."""
    if link.complete:
        return "complete"
    numbers = before.jobs.get(link.name, [])
    for number in numbers:
        if number in living:
            return f"job {number} is {living[number].lower()}"
    records = link.prepared.work.records
    # only of this submission: the records have earlier attempts as well
    ends = [r for file in (records / ATTEMPTS, *sorted(records.glob(f"task-*/{ATTEMPTS}")))
            for r in read_events(file)
            if r["event"] == "end" and r["time_s"] >= before.time_s and r["outcome"] != "complete"]
    if ends:
        return f"not complete, its job ended by: {ends[-1]['outcome']}, {ends[-1]['reason']}"
    if said := [argv for number in numbers if (argv := read_last_log_line(records, number))]:
        return f"not complete, its job ended before it began its work: {said[-1]}"
    return (f"not complete, its job {' and '.join(numbers) or '(none)'} never began: "
            "an earlier stage failed, or it was cancelled")


def prepare_links(chain: str, options: SubmitOptions, commands: Commands) -> list[ChainLink]:
    """Return the stages of a chain with their scripts; nothing is written and Slurm is not asked.

    Raises:
        UserError: something about them does not fit.
    """
    from megatron_sov.commands.operate.job_summary import check_data  # imports numpy

    config = read_chain(chain)
    links: list[ChainLink] = []
    for number, stage in enumerate(config.stages):
        # a chain is a line unless a stage says otherwise
        before = (config.stages[number - 1].label,) if number else ()
        after = before if stage.after is None else stage.after
        needs = tuple(link.prepared.work.done for link in links if link.name in after)
        ready = _ready(chain, number, stage, options) if options.scripts is not None else None
        try:
            request = _request(config, stage, options, needs, ready)
            links.append(ChainLink(stage.label, after, submission.prepare(request, commands, check_data)))
        except UserError as e:
            raise UserError(f"{chain}: stage {stage.label}: {e}") from None
    # the same stage in the same folder: their records and logs would mix
    targets = Counter((link.prepared.work.records, link.prepared.work.stage) for link in links)
    if same := [records for (records, _), count in targets.items() if count > 1]:
        raise UserError(f"{chain}: two stages write to {same[0].parent}; give each a folder of its own")
    return links


def _request(config: ChainConfig, stage: ChainStage, options: SubmitOptions, needs: tuple[Path, ...],
             ready: ReadySubmission | None) -> submission.SubmitRequest:
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
    profile = cluster.load_profile(chosen, account=options.account, partition=options.partition,
                                   needs_account=ready is None)
    return submission.SubmitRequest(
        stage.stage, stage.argv(READY_ROOT if ready else None), profile, stage.nodes, stage.min_nodes or None,
        cluster.parse_node_settings(stage.nodes_set), stage.array, needs,
        stage.time_limit or options.time_limit, ready, chosen, stage.engine_nodes)


def _ready(chain: str, number: int, stage: ChainStage, options: SubmitOptions) -> ReadySubmission:
    assert options.scripts is not None, chain
    name = f"{Path(chain).stem}-{stage.label}"
    chosen = f" --cluster {options.cluster}" if options.cluster else ""
    return ReadySubmission(name, options.scripts / f"{number + 1:02}-{stage.label}.sbatch",
                           f"megatron-sov submit chain {chain}{chosen} --scripts {options.scripts}",
                           stage.note)


def write_scripts(chain: str, folder: Path, options: SubmitOptions, commands: Commands) -> list[Path]:
    """Write the scripts of a chain; returns them in the order in which they are submitted.

    Args:
        chain: name of one that comes with the package, or a file.
        folder: where they go; as it is given it stands in their comments.
        options: the command line's, which name the folder too.
        commands: the parsers of the stages' commands.

    Raises:
        UserError: something about the chain does not fit, or a script of that name, which may have been
            changed, is there.
    """
    links = prepare_links(chain, options, commands)
    scripts = {job.script: text for link in links
               for job, text in zip(link.prepared.jobs, link.prepared.texts, strict=True)}
    # all are looked at before the first is written
    if there := [path for path in scripts if path.exists()]:
        raise UserError(f"{there[0]}: is there already, and may have been changed; "
                        "remove it, or choose another --scripts folder")
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in scripts.items():
        write_atomically(path, text)
    return list(scripts)




def _declare_eval_lm(parser: argparse.ArgumentParser) -> None:
    """Declare what `eval lm` takes, a stage of its own since several jobs may share it."""
    from megatron_sov.commands.evaluate.eval_lm import EvalLmOptions

    add_options(parser, EvalLmOptions)


def _declare(command: str, parser: argparse.ArgumentParser) -> None:
    """Declare what a command takes; it is imported now."""
    PROGRAMS[command.replace("-", " ")].load().add_arguments(parser)


STAGE_PARSERS: Commands = {"eval-lm": _declare_eval_lm} | {name: partial(_declare, name) for name in (
    "pretrain", "extend", "sft", "prefer", "distill", "convert", "eval", "rl-run", "rl-train", "rl-generate",
    "rl-reward")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; its options may stand before the stage or among the
    stage's own arguments."""
    parser.epilog = ("ARGUMENTS are what follows the stage's own command: megatron-sov pretrain, extend, "
                     "sft, prefer, distill, convert, eval, eval lm, rl run, rl train, rl generate, rl "
                     "reward; sov-tokenizer; sov-data.  Chains that come "
                     f"with the package, besides files of your own: {', '.join(list_chains())}.")
    parser.add_argument("stage", metavar="STAGE", help=f"{', '.join(STAGES)}, or chain: several, from a file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER,
                        help="the stage's own, or the chain's file")
    add_options(parser, SubmitOptions)


def run(typed: argparse.Namespace) -> int:
    """Submit; returns 0 when Slurm has the job."""
    if {"-h", "--help"} & set(typed.arguments):
        _help(typed.stage)
        return 0
    parser = Parser(prog="megatron-sov submit", add_help=False, allow_abbrev=False)
    add_options(parser, SubmitOptions)
    # options of `submit` may stand among the stage's own: taken out here, the rest is the stage's
    typed, argv = parser.parse_known_args(typed.arguments, typed)
    options = read_options(SubmitOptions, typed)
    if typed.stage == "chain":
        return _chain(argv, options)
    try:
        return _stage(typed.stage, argv, options)
    except UserError as e:
        words = shlex.split(e.fix.line) if e.fix else []
        if words[:2] != ["submit", typed.stage]:
            raise
        line = [*words[:2], *list_option_words(options), *words[2:]]
        raise UserError(e.sentence, Fix(f"megatron-sov {shlex.join(line)}")) from None


def _help(stage: str) -> None:
    """Print what a stage takes: the options of `submit`, then those of its own command."""
    ours = Parser(prog=f"megatron-sov submit {stage}", formatter_class=HelpFormatter, usage=argparse.SUPPRESS,
                  description="Options of submit, which may stand before the stage or behind it:",
                  add_help=False)
    add_options(ours, SubmitOptions)
    print(ours.format_help())
    if stage in STAGE_PARSERS:
        parser = Parser(prog=f"megatron-sov submit {stage}", formatter_class=HelpFormatter)
        STAGE_PARSERS[stage](parser)
        parser.print_help()
    elif stage in STAGES:
        print(f"`{'sov-tokenizer' if stage == 'tokenizer' else 'sov-data'} --help` lists what comes behind "
              f"submit {stage}")
    else:
        print(f"submit chain takes one file: {', '.join(list_chains())}, or a YAML file of yours "
              "(docs/slurm.md)")


def _stage(stage: str, argv: list[str], options: SubmitOptions) -> int:
    from megatron_sov.commands.operate.job_summary import check_data, show_dry_run, summarize  # imports numpy

    if options.continue_chain:
        raise UserError("--continue: belongs to a chain; a stage continues by itself when it is "
                        "submitted again")
    if options.scripts is not None:
        raise UserError(f"--scripts {options.scripts}: belongs to a chain; "
                        "--dry-run prints the script of a stage")
    check_stage(stage)
    profile = cluster.load_profile(_cluster_name(options, stage, argv), account=options.account,
                                   partition=options.partition)
    request = submission.SubmitRequest(stage, tuple(argv), profile, options.nodes or 1, options.min_nodes,
                                       cluster.parse_node_settings(options.nodes_set), options.array,
                                       time_limit=options.time_limit, cluster=_cluster_name(options),
                                       engine_nodes=options.engine_nodes)
    prepared = submission.prepare(request, STAGE_PARSERS, check_data)
    if options.prove and prepared.work.config is None:
        raise UserError(f"--prove: plays the layout of a training stage, and {stage} has none; leave it out")
    if not options.dry_run:
        check_inputs(prepared.work, set())
    if options.prove and not _is_proved(prepared):
        return ExitCode.GATE_FAILED
    if options.dry_run:
        show_dry_run(prepared)
        return 0
    # Slurm is asked last: it is the slowest, and everything else is known without it
    submission.check(prepared)
    numbers = submission.submit(prepared, [])
    print(f"submitted {stage} as job {' and '.join(numbers)}\nscript: {prepared.jobs[0].script}\n"
          f"log:    {prepared.work.records}/{numbers[0]}{'_*' if options.array else ''}.log")
    print("".join(f"{line}\n" for line in summarize(prepared)), end="")
    return 0


def _is_proved(prepared: submission.Prepared) -> bool:
    """Return whether each layout that a training stage may have does what one process does; says so."""
    from megatron_sov.engine.parallel import cpu_shims

    config = prepared.work.config
    assert config is not None
    # before megatron-core is imported, whatever the machine has
    cpu_shims.prepare_without_gpu()
    from megatron_sov.proof.proving import EQUAL, as_text, prove_run

    [job] = prepared.jobs
    for nodes, settings in job.layouts.items():
        small, verdict = prove_run(apply_settings(config, list(settings)),
                                   nodes * job.profile.tasks_per_node)
        print(as_text(small, verdict), file=sys.stderr)  # a script on stdout is for a file
        if verdict.outcome != EQUAL:
            return False
    return True


def _chain(argv: list[str], options: SubmitOptions) -> int:
    if len(argv) != 1:
        raise UserError(f"submit chain: takes one file, not {' '.join(argv) or 'none'}; stages and their "
                        f"arguments stand in it (chains of the package: {', '.join(list_chains())})")
    given = [name for name in ("nodes", "min_nodes", "nodes_set", "engine_nodes", "array")
             if getattr(options, name)]
    if options.prove:
        raise UserError("submit chain: --prove belongs to a stage; prove its recipe's layout with "
                        "`megatron-sov plan RECIPE --prove`")
    if given:
        raise UserError(f"submit chain: --{given[0].replace('_', '-')} belongs to a stage; "
                        f"write it into {argv[0]}")
    if options.scripts is not None and (options.dry_run or options.continue_chain):
        raise UserError(f"--scripts {options.scripts}: submits nothing; leave out --dry-run and --continue")
    if options.scripts is None:
        return submit_chain(argv[0], options, STAGE_PARSERS)
    for script in write_scripts(argv[0], options.scripts, options, STAGE_PARSERS):
        print(script)
    return 0


def _cluster_name(options: SubmitOptions, stage: str = "", argv: Sequence[str] = ()) -> str:
    """Return the value of --cluster; if it is missing, the error says what is wrong with the stage's own
    arguments too, e.g. options of sbatch."""
    if options.cluster is not None:
        return options.cluster
    advice = [f"pass one of {', '.join(cluster.list_profiles())}, or a YAML file of your own"]
    if options.account is None:
        advice.append("--account NAME if your Slurm asks for one")
    if options.nodes is None:
        advice.append("--nodes N (default 1)")
    advice.append("--partition and --time replace the profile's")
    options_typed = [("--cluster", "h100", options.cluster), ("--account", "ACCOUNT", options.account),
                     ("--nodes", "1", options.nodes if STAGES[stage].ranks else 1)]
    missing = [word for name, value, typed in options_typed if typed is None for word in (name, value)]
    raise UserError(f"--cluster: is missing; {'; '.join(advice)}", Fix(options=tuple(missing)))

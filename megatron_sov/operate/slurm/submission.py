"""One submission: everything is checked, templates of scripts are filled with the stage and the cluster's
profile, code, settings and script are laid beside the run, then Slurm is asked.  Everything from outside is
quoted for the shell."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_sov
from megatron_sov.base.artifacts import create_folder, format_json, translate_disk_errors, write_atomically
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.operate.slurm.stages import ENGINE_SET, Commands, StageWork, fitting_nodes, work_of
from megatron_sov.runs.folder import SUBMISSIONS, list_submitted_jobs
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.version import OUR_PACKAGES
from megatron_sov.work.clusters import client, cluster
from megatron_sov.work.clusters.cluster import ClusterProfile, parse_time_limit

if TYPE_CHECKING:
    import jinja2

PLAIN = re.compile(r"[A-Za-z0-9_./:,=@+%-]+")
PORTS = 20000, 10000
"""First rendezvous port, and how many there are: below those that a system hands out by itself."""
READY_ROOT = "/$WORK"
"""Stands for the folder of $WORK in the paths of a ready script, until the shell puts it there."""


@dataclass(frozen=True)
class ReadySubmission:
    """What makes a script ready for any folder: its paths begin with $WORK, and it runs the code
    that its Python has."""

    name: str
    """Of the job."""
    script: Path
    """The file."""
    made_by: str
    """The command that writes it, for those who want to change it."""
    note: str = ""
    """What people should know before they submit it."""


@dataclass(frozen=True)
class SlurmJob:
    """A job to be written as a script."""

    work: StageWork
    """What it has to do."""
    profile: ClusterProfile
    """Where."""
    cwd: Path
    """Folder that relative paths start from."""
    code: Path | None
    """Copy of the code that it runs; None: what its Python has."""
    script: Path
    """Where the script will lie."""
    layouts: dict[int, tuple[str, ...]]
    """Number of nodes -> settings; the largest is what is asked for, the smallest what it goes on with."""
    array: int = 0
    """Tasks that share the inputs, or the work; 0: no array."""
    array_inputs: tuple[str, ...] = ()
    """What the tasks share out before they begin."""
    time_limit: str = ""
    """As sbatch takes it; at the end of it the job is asked to save, `signal_lead_s` before."""
    needs: tuple[Path, ...] = ()
    """Completion manifests of earlier stages of its chain."""
    ready: ReadySubmission | None = None
    """None: a script for this folder alone."""
    engine_nodes: int = 0
    """Nodes beside these, for engine servers."""
    cluster: str = ""
    """Profile, as --cluster takes it: a run's own plan reckons with it; empty: it does not."""

    @property
    def title(self) -> str:
        """What it does, in a sentence."""
        if self.array_inputs:
            return (f"Data, one task of {self.array}: packs every {self.array}th input into a part; "
                    "a job that waits for all parts joins them.")
        return self.work.kind.title

    @property
    def asks_for(self) -> str:
        """What it needs, in a sentence."""
        profile, nodes = self.profile, max(self.layouts)
        if not self.work.kind.ranks:
            gpus = (f" and {profile.gpus_per_node} GPUs" if self.work.kind.gpus and profile.gpus_per_node
                    else "")
            return (f"Asks for one node of {profile.cpus_per_node} "
                    f"cores{gpus}{' for each task' if self.array else ''}.")
        unit = (f"{profile.gpus_per_node} GPUs" if profile.gpus_per_node
                else f"{profile.ranks_per_node} processes on CPUs")
        assert self.work.config is not None, self.work.stage
        layout = apply_settings(self.work.config, list(self.layouts[nodes])).parallel
        values = {f.name: getattr(layout, f.name)
                  for f in dataclasses.fields(layout) if getattr(layout, f.name) != f.default}
        chosen = [name if value is True else f"{name} {value}" for name, value in values.items()]
        num_ranks = nodes * profile.tasks_per_node
        chosen.append(f"data parallel {num_ranks // layout.ranks_per_replica}")
        more = f", and {self.engine_nodes} nodes of engine servers" if self.engine_nodes else ""
        return f"Asks for {nodes} x {unit}{more}; layout: {', '.join(chosen)}."


def render(job: SlurmJob) -> str:
    """Return the script.

    Raises:
        UserError: a path holds what Slurm would take for something else.
    """
    for path in (job.work.records, *(() if job.ready else (job.cwd,))):
        if "%" in str(path) or "\\" in str(path) or "\n" in str(path):
            raise UserError(f"{path}: holds a character that Slurm reads as a placeholder (%, "
                            "\\ or a line end); choose another")
    work, profile = job.work, job.profile
    # limits go into the script: a job that starts next week judges by today's profile
    limits = {**dataclasses.asdict(profile.preflight), "num_gpus": profile.gpus_per_node,
              "ranks_per_node": profile.tasks_per_node}
    template = "array" if job.array else "training" if work.kind.ranks else "work"
    return _environment(job.ready is not None).get_template(f"{template}.sbatch.j2").render(
        work=work, kind=work.kind, profile=profile, job=job, ready=job.ready, name=_job_name(job),
        nodes=max(job.layouts), least=min(job.layouts), limits=json.dumps(limits), first_port=PORTS[0],
        num_ports=PORTS[1], engines=_engine_words(job), python=_python(job), own_python=not profile.python
        and profile.container.kind == "none", command=["-m", *work.kind.program, *work.arguments])


def _engine_words(job: SlurmJob) -> dict[str, Any]:
    """Return what the servers on a node are started with, and what the run is told beside their addresses."""
    asked = job.work.engines
    if not job.engine_nodes or asked is None:
        return {}
    unit = job.profile.tasks_per_node
    count = unit // asked.gpus
    words = ["-m", "megatron_sov", "rl", "engines", *job.work.arguments, ENGINE_SET, f"servers={count}"]
    if job.profile.gpus_per_node:
        words += [ENGINE_SET, f"devices={json.dumps([str(number) for number in range(unit)])}"]
    # the default is the memory of one machine, whose files servers of others do not see
    is_told = asked.weights or asked.transfer != "files"
    told = [] if is_told else [ENGINE_SET, f"weights={job.work.target / 'engines'}"]
    return {"count": count, "words": words, "told": told}


@functools.cache
def _environment(ready: bool) -> jinja2.Environment:
    """Return what fills templates; compiled ones are kept."""
    import jinja2

    # no escaping for HTML: `sh` quotes for the shell, and an undefined name is an error
    environment = jinja2.Environment(loader=jinja2.FunctionLoader(_source), undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                                     autoescape=False)
    quoted = _quoted_ready if ready else _quoted
    environment.globals["this_job"] = client.THIS_JOB
    environment.filters |= {"sh": quoted, "directive": _directive, "lines": lambda argv: _lines(argv, quoted)}
    return environment


def _source(name: str) -> str:
    return importlib.resources.files("slurm").joinpath("templates", name).read_text(encoding="utf-8")


def _job_name(job: SlurmJob) -> str:
    name = (f"{job.ready.name}{'-parts' if job.array else ''}" if job.ready
            else f"{job.work.stage}-{job.work.target.name}")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _python(job: SlurmJob) -> str:
    """Return the Python program as the shell reads it; a ready script knows no path of this machine."""
    if job.ready and not job.profile.python and job.profile.container.kind == "none":
        return '"${PYTHON:-python3}"'
    return _quoted(job.profile.python_program)


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _quoted_ready(value: Any) -> str:
    """Quote a value in which the shell is to put the folder of $WORK."""
    # "$WORK" stays open for the shell, everything around it is quoted
    parts = str(value).split(READY_ROOT)
    return '"$WORK"'.join(shlex.quote(part) if part else "" for part in parts) or "''"


def _directive(value: Any) -> str:
    """Quote a value for a line that begins with #SBATCH, which Slurm reads by rules of its own."""
    text = str(value)
    if "\n" in text:
        raise UserError(f"{text!r}: holds a line end, which a job script's header cannot")
    return text if PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(argv: list[str] | tuple[str, ...], quoted: Callable[[str], str]) -> str:
    """Return quoted words, a new line before each option."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(quoted(word))
    return "\n  ".join(" ".join(line) for line in lines if line)


SIGNAL_TOLERANCE_S = 60
"""How much earlier than asked for sbatch's --signal may come."""
ROOT = Path(megatron_sov.__file__).parents[1]


@dataclass(frozen=True)
class SubmitRequest:
    """One stage as it was asked for."""

    stage: str
    arguments: tuple[str, ...]
    profile: ClusterProfile
    nodes: int = 1
    least: int | None = None
    """Fewest nodes to go on with; None: as many as asked for."""
    settings: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Number of nodes -> settings that change then."""
    array: int = 0
    """Tasks that share the inputs of `data pack`, or the work of a stage that can be shared."""
    needs: tuple[Path, ...] = ()
    """Completion manifests of earlier stages."""
    time_limit: str | None = None
    """Time limit; None: the stage's, or the profile's."""
    ready: ReadySubmission | None = None
    """What a ready script says of itself; None: a script to be submitted from here."""
    cluster: str = ""
    """What --cluster named, for the plan that a run keeps; empty: nobody tells the run."""
    engine_nodes: int = 0
    """Nodes beside these, for engine servers."""


@dataclass(frozen=True)
class Prepared:
    """Scripts of one stage, checked and not yet written: one, or parts and what joins them."""

    work: StageWork
    jobs: tuple[SlurmJob, ...]
    texts: tuple[str, ...]


def prepare(request: SubmitRequest, commands: Commands,
            checked: Callable[[StageWork], StageWork] = lambda work: work) -> Prepared:
    """Return a stage's scripts; nothing is written and Slurm is not asked.

    Args:
        request: the stage.
        commands: the parsers of the stages' commands.
        checked: checks the data of a stage, and returns the stage with the settings that follow from them.

    Raises:
        UserError: the stage, its arguments or the nodes do not fit.
    """
    # first the stage's own parser: its complaints are about what the user typed
    work = work_of(request.stage, list(request.arguments), commands, bool(request.profile.gpus_per_node))
    work = checked(dataclasses.replace(work, num_ranks=request.nodes * request.profile.tasks_per_node))
    if request.ready and not str(work.target).startswith(READY_ROOT):
        raise UserError(f"{request.stage}: writes to {work.target}, which means nothing elsewhere; "
                        "in a ready script the paths that a stage writes to begin with $WORK")
    least = request.nodes if request.least is None else request.least
    if least > request.nodes:
        raise UserError(f"--min-nodes {least}: must not be above --nodes {request.nodes}; change one of them")
    if not work.kind.ranks and request.nodes > 1:
        raise UserError(f"--nodes {request.nodes}: {request.stage} works on one node; leave it out"
                        + (" (data pack: --array N shares its inputs)" if request.stage == "data" else ""))
    if unused := [count
                  for count in request.settings if not (work.kind.ranks and least <= count <= request.nodes)]:
        raise UserError(f"--nodes-set {unused[0]}:{request.settings[unused[0]][0]}: "
                        + (f"the job has never {unused[0]} nodes; see to --nodes {request.nodes} and "
                           f"--min-nodes {least}"
                           if work.kind.ranks else f"{request.stage} works on one node; leave it out"))
    layouts: dict[int, tuple[str, ...]] = {1: ()}
    if work.kind.ranks:
        layouts = fitting_nodes(work, request.profile, request.nodes, least, request.settings)
    # before anything is written
    _check_side_jobs(work)
    if request.engine_nodes:
        _check_engines(work, request)
    # the job runs a copy of the code here; a ready script runs the code of its own Python. It is
    # named by its content: two submissions of the same code share a copy
    code = None if request.ready else work.records / _code_name(ROOT)
    script = request.ready.script if request.ready else work.records / f"{request.stage}.sbatch"
    base = SlurmJob(work, request.profile, Path.cwd(), code, script, layouts, needs=request.needs,
                    time_limit=_time_limit(request, work), ready=request.ready,
                    engine_nodes=request.engine_nodes, cluster=_told_cluster(request))
    # parts first, then what joins them: `submit` makes each wait for the one before
    jobs = _parts(base, request.array) if request.array else (base,)
    return Prepared(work, jobs, tuple(render(job) for job in jobs))


def _check_engines(work: StageWork, request: SubmitRequest) -> None:
    """Raise `UserError` where servers cannot have nodes of their own, or would leave a part of them idle."""
    if work.engines is None or request.ready:
        raise UserError(f"--engine-nodes {request.engine_nodes}: are for `submit rl-run ... --engine vllm` "
                        "without --engine-url; leave it out")
    each, unit = work.engines.gpus, request.profile.tasks_per_node
    if unit % each:
        raise UserError(f"--engine-set tp={work.engines.tp} dp={work.engines.dp}: a server takes {each} "
                        f"GPUs, which must divide the {unit} of a node; servers over several nodes are not "
                        "supported")


def _told_cluster(request: SubmitRequest) -> str:
    """Return what names a profile where the job runs; a ready script names no file of this machine."""
    if request.cluster.endswith((".yaml", ".yml")):
        return "" if request.ready else str(Path(request.cluster).resolve())
    return request.cluster


def _check_side_jobs(work: StageWork) -> None:
    """Raise `UserError` where the jobs that are to judge a run's exports could never be submitted;
    the run would only warn."""
    if (work.config is not None and work.config.evaluate.background.tasks
            and work.config.evaluate.background.where == "slurm"):
        try:
            cluster.load_profile(work.config.evaluate.background.cluster)
        except UserError as e:
            raise UserError(f"evaluate.background.cluster = {work.config.evaluate.background.cluster}: "
                            f"the jobs beside the run would be refused ({e})") from None


def _time_limit(request: SubmitRequest, work: StageWork) -> str:
    """Return the time limit of a stage's jobs.

    Raises:
        UserError: it is none, or so short that the job would be asked to stop as soon as it has
            begun, again and again.
    """
    # the tighter of the stage's and the profile's, by their length and not as text
    defaults = [limit for limit in (work.kind.time_limit, request.profile.time_limit) if limit]
    limit = request.time_limit if request.time_limit is not None else min(defaults, key=parse_time_limit)
    lead_s = request.profile.signal_lead_s
    if parse_time_limit(limit) <= lead_s + SIGNAL_TOLERANCE_S:
        raise UserError(f"time limit {limit!r}: is {parse_time_limit(limit):g} s, and the job is asked to "
                        f"save signal_lead_s = {lead_s} before it ends, by Slurm up to "
                        f"{SIGNAL_TOLERANCE_S} s earlier, so no work would be done; "
                        "pass a longer --time, or a profile with a shorter signal_lead_s")
    return limit


def _parts(base: SlurmJob, count: int) -> tuple[SlurmJob, ...]:
    """Return the array that packs a part in each task, and the job that joins them; or the array of a stage
    whose jobs share its work by themselves."""
    work = base.work
    argv = list(work.arguments)
    # these share their work by themselves, so all tasks run the same command
    if work.kind.shares and count > 0:
        return (dataclasses.replace(base, array=count),)
    if work.stage != "data" or argv[0] != "pack":
        raise UserError(f"--array {count}: is for `data pack`, whose inputs it shares out, eval-lm, "
                        f"rl-generate and rl-reward; leave it out for {work.stage}")
    parser = Parser(prog="submit data pack", add_help=False, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", action="extend", default=[])
    parser.add_argument("--output")
    # each task gets its own inputs and output; everything else is the same for all
    found, others = parser.parse_known_args(argv)
    inputs = found.input
    if not 1 < count <= len(inputs):
        raise UserError(f"--array {count}: must lie between 2 and the number of --input, {len(inputs)}; "
                        "tasks pack whole ones")
    parts = [f"{work.target}.parts/part-{i}" for i in range(count)]
    packing = dataclasses.replace(work, arguments=tuple(others))
    joining = dataclasses.replace(work, arguments=("mix", *parts, "--output", str(work.target)))
    # the joining job also checks that each part is complete: a part's exit code is not enough
    needs = tuple(Path(p) / "manifest.json" for p in parts)
    return (dataclasses.replace(base, work=packing, array=count, array_inputs=tuple(inputs),
                                script=base.script.with_name(f"{base.script.stem}-parts.sbatch")),
            dataclasses.replace(base, work=joining, needs=needs))


def check(prepared: Prepared) -> None:
    """Ask Slurm whether it would take the scripts, and whether the stage is in its hands already.

    Raises:
        UserError: Slurm is not there, has no such partition, refuses a script, or has a living
            job of this stage.
    """
    # the cheap questions first; `sbatch --test-only` then looks at each script
    client.check_partition(prepared.jobs[0].profile.partition)
    for text in prepared.texts:
        client.check_script(text)
    # two jobs of one stage would work in the same folder
    living = client.read_active_states(list_submitted_jobs(prepared.work.records))
    if living:
        number, state = next(iter(living.items()))
        raise UserError(f"{prepared.work.target}: its job {number} is {state.lower()}; "
                        f"wait for it, or `scancel {number}`")


def submit(prepared: Prepared, after: list[str]) -> list[str]:
    """Write everything and submit it; returns the jobs' numbers, of which the last is the one to wait for.

    Args:
        prepared: what was checked.
        after: jobs that have to end well before.

    Raises:
        UserError: the folder cannot be written, or Slurm refuses.
    """
    records = prepared.work.records
    with translate_disk_errors(records):
        try:
            # before the first write, so that a file in the way is told and not a traceback
            records.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{records}: cannot be made, since a file is in the way; "
                            "choose another folder") from None
        _copy_code(_code_of(prepared.jobs[0]))
    numbers: list[str] = []
    log = EventLog(records / SUBMISSIONS)
    try:
        for job, text in zip(prepared.jobs, prepared.texts, strict=True):
            write_atomically(job.script, text)
            write_atomically(job.script.with_suffix(".json"), format_json(_settings(job)))
            # logged at once: a kill between two submissions leaves no job that nobody knows of
            numbers.append(client.submit_script(job.script, after=numbers[-1:] or after))
            log.write("submitted", job=numbers[-1], stage=job.work.stage, script=job.script.name,
                      nodes=max(job.layouts), after=numbers[-2:-1] or after)
    except UserError:
        # all or none: parts without what joins them would be work for nothing
        client.cancel_jobs(numbers)
        raise
    finally:
        log.close()
    return numbers


def _code_of(job: SlurmJob) -> Path:
    assert job.code is not None, f"{job.script}: a ready script is not submitted from here"
    return job.code


def _settings(job: SlurmJob) -> dict[str, Any]:
    """Return what a script was made from, for people and for `status`."""
    return {"stage": job.work.stage, "arguments": list(job.work.arguments), "target": str(job.work.target),
            "done": str(job.work.done), "nodes": {str(n): list(s) for n, s in job.layouts.items()},
            "profile": dataclasses.asdict(job.profile), "cwd": str(job.cwd), "code": _code_of(job).name,
            "config": job.work.config.to_dict() if job.work.config is not None else None}


def _sources(root: Path) -> list[tuple[Path, str]]:
    """Return (file, its place in a copy) of all our code below a folder."""
    return [(p, p.relative_to(root).as_posix()) for package in OUR_PACKAGES
            for p in sorted((root / package).rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


def _code_name(root: Path) -> str:
    """Return the name of a copy of the code below a folder: it tells the content."""
    digest = hashlib.sha256()
    for path, name in _sources(root):
        # names and bytes, separated: content that moves from one file to another changes the digest
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"code-{digest.hexdigest()[:12]}"


def _copy_code(folder: Path) -> None:
    """Copy our code, so that a job that starts next week runs what was submitted;
    a copy of the same content is kept."""
    if folder.is_dir():
        return
    # two submissions at once may copy the same code: the first one stays
    with create_folder(folder, keep_existing=True) as temporary:
        for path, name in _sources(ROOT):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        # someone edited while the copy was made: the job would run neither the old code nor the new
        if folder.name != _code_name(temporary):
            raise UserError(f"{folder}: the code changed while it was copied; submit again when it stands "
                            "still")


def show(prepared: Prepared) -> None:
    for job, text in zip(prepared.jobs, prepared.texts, strict=True):
        sys.stdout.write(f"# {job.script}\n{text}\n")

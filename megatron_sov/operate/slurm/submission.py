"""Checks, writes and submits a stage's job scripts.

A script is a template from `slurm/templates`, filled with the stage and the cluster profile; user input is
quoted for the shell. The code, settings and script are copied to the job's records.
"""

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
from typing import Any

import jinja2

import megatron_sov
from megatron_sov.base.artifacts import create_folder, format_json, translate_disk_errors, write_atomically
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.operate.slurm.stages import ENGINE_SET, Commands, StageWork, build_stage_work, find_layouts
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.runs.folder import SUBMISSIONS, list_submitted_jobs
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.version import OUR_PACKAGES
from megatron_sov.work.clusters import client, cluster
from megatron_sov.work.clusters.cluster import ClusterProfile, parse_time_limit
from megatron_sov.work.clusters.units import GIB

PLAIN = re.compile(r"[A-Za-z0-9_./:,=@+%-]+")
PORTS = 20000, 10000
"""First rendezvous port and port count, below Linux's ephemeral ports."""
READY_ROOT = "/$WORK"
"""Placeholder for $WORK in paths of a ready script; the shell expands it."""
SIGNAL_TOLERANCE_S = 60
"""sbatch --signal may come this much early."""
ROOT = Path(megatron_sov.__file__).parents[1]


@dataclass(frozen=True)
class ReadySubmission:
    """Properties for a ready script: users submit the file, with paths under $WORK, by `sbatch`."""

    name: str
    """Job name."""
    script: Path
    made_by: str
    """Command that writes the script."""
    note: str = ""
    """Advice before submission."""


@dataclass(frozen=True)
class SlurmJob:
    """Values for a job script."""

    work: StageWork
    profile: ClusterProfile
    cwd: Path
    """Base for relative paths."""
    code: Path | None
    """Copied code; None: packages in the job's Python."""
    script: Path
    layouts: dict[int, tuple[str, ...]]
    """Number of nodes -> settings; the job requests the largest number and continues with the others."""
    array: int = 0
    """Tasks that divide the inputs or the work; 0: no array."""
    array_inputs: tuple[str, ...] = ()
    """Inputs for the tasks."""
    time_limit: str = ""
    """sbatch --time; `signal_lead_s` before the limit, a signal requests a checkpoint."""
    needs: tuple[Path, ...] = ()
    """Completion manifests from earlier stages in the chain."""
    ready: ReadySubmission | None = None
    """None: a script for this working folder."""
    engine_nodes: int = 0
    """Additional nodes for engine servers."""
    cluster: str = ""
    """--cluster, for the run's own plan; empty: no plan."""

    @property
    def title(self) -> str:
        if self.array_inputs:
            return (f"Data, one task of {self.array}: packs every {self.array}th input into a part; "
                    "a job that waits for all parts joins them.")
        return self.work.kind.title

    @property
    def resources(self) -> str:
        """Sentence on nodes, GPUs and layout."""
        profile, nodes = self.profile, max(self.layouts)
        if not self.work.kind.ranks:
            uses_gpus = self.work.kind.gpus and profile.gpus_per_node
            gpus = f" and {profile.gpus_per_node} GPUs" if uses_gpus else ""
            tasks = " for each task" if self.array else ""
            return f"Asks for one node of {profile.cpus_per_node} cores{gpus}{tasks}."
        unit = (f"{profile.gpus_per_node} GPUs" if profile.gpus_per_node
                else f"{profile.ranks_per_node} processes on CPUs")
        assert self.work.config is not None, self.work.stage
        config = apply_settings(self.work.config, list(self.layouts[nodes]))
        layout = config.parallel
        values = {f.name: getattr(layout, f.name)
                  for f in dataclasses.fields(layout) if getattr(layout, f.name) != f.default}
        chosen = [name if value is True else f"{name} {value}" for name, value in values.items()]
        num_ranks = nodes * profile.tasks_per_node
        chosen.append(f"data parallel {num_ranks // layout.ranks_per_replica}")
        more = f", and {self.engine_nodes} nodes of engine servers" if self.engine_nodes else ""
        memory = find_fullest_stage(config, num_ranks)[1].total / GIB
        return (f"Asks for {nodes} x {unit}{more}; layout: {', '.join(chosen)}; train.fp8 "
                f"{config.train.fp8}; {memory:.3g} GiB of memory per rank (docs/memory.md).")


def render_script(job: SlurmJob) -> str:
    """Fill a template from `slurm/templates`.

    Raises:
        UserError: a path contains a placeholder of Slurm.
    """
    for path in (job.work.records, *(() if job.ready else (job.cwd,))):
        if "%" in str(path) or "\\" in str(path) or "\n" in str(path):
            raise UserError(f"{path}: holds a character that Slurm reads as a placeholder (%, "
                            "\\ or a line end); choose another")
    work, profile = job.work, job.profile
    # the limits of today's profile, even for a job that starts next week
    limits = {**dataclasses.asdict(profile.preflight), "num_gpus": profile.gpus_per_node,
              "ranks_per_node": profile.tasks_per_node}
    template, group_size = "work", 1
    if work.kind.ranks and work.config is not None:
        layout = apply_settings(work.config, list(job.layouts[max(job.layouts)])).parallel
        template, group_size = "training", layout.ep * layout.etp
    if job.array:
        template = "array"
    return _build_environment(job.ready is not None).get_template(f"{template}.sbatch.j2").render(
        work=work, kind=work.kind, profile=profile, job=job, ready=job.ready, name=_format_job_name(job),
        nodes=max(job.layouts), least=min(job.layouts), limits=json.dumps(limits),
        group_size=group_size, first_port=PORTS[0],
        num_ports=PORTS[1], engines=_build_engine_words(job), python=_quote_python(job),
        own_python=not profile.python and profile.container.kind == "none",
        command=["-m", *work.kind.program, *work.arguments])


def _build_engine_words(job: SlurmJob) -> dict[str, Any]:
    """Return `count` servers per node, their command line `words`, and `run_words` for the run."""
    engines = job.work.engines
    if not job.engine_nodes or engines is None:
        return {}
    node_gpus = job.profile.tasks_per_node
    count = node_gpus // engines.num_gpus
    words = ["-m", "megatron_sov", "rl", "engines", *job.work.arguments, ENGINE_SET, f"servers={count}"]
    if job.profile.gpus_per_node:
        words += [ENGINE_SET, f"devices={json.dumps([str(number) for number in range(node_gpus)])}"]
    # the default folder is in one machine's memory, invisible to servers on other nodes
    is_set = engines.weights or engines.transfer != "files"
    run_words = [] if is_set else [ENGINE_SET, f"weights={job.work.target / 'engines'}"]
    return {"count": count, "words": words, "run_words": run_words}


@functools.cache
def _build_environment(ready: bool) -> jinja2.Environment:
    # the filter `sh` quotes for the shell; HTML escapes would corrupt scripts
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read_template), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    quote = _quote_ready if ready else _quote_word
    environment.globals["this_job"] = client.THIS_JOB
    environment.filters |= {"sh": quote, "directive": _quote_directive,
                            "lines": lambda argv: _format_lines(argv, quote)}
    return environment


def _read_template(name: str) -> str:
    return importlib.resources.files("slurm").joinpath("templates", name).read_text(encoding="utf-8")


def _format_job_name(job: SlurmJob) -> str:
    name = f"{job.work.stage}-{job.work.target.name}"
    if job.ready:
        name = f"{job.ready.name}-parts" if job.array else job.ready.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _quote_python(job: SlurmJob) -> str:
    """Return the Python program as a shell word; a ready script uses no path on this machine."""
    if job.ready and not job.profile.python and job.profile.container.kind == "none":
        return '"${PYTHON:-python3}"'
    return _quote_word(job.profile.python_program)


def _quote_word(value: Any) -> str:
    return shlex.quote(str(value))


def _quote_ready(value: Any) -> str:
    """Quote a value for the shell, except for $WORK."""
    parts = str(value).split(READY_ROOT)
    return '"$WORK"'.join(shlex.quote(part) if part else "" for part in parts) or "''"


def _quote_directive(value: Any) -> str:
    """Quote a value for an `#SBATCH` line by Slurm's rules."""
    text = str(value)
    if "\n" in text:
        raise UserError(f"{text!r}: holds a line end, which a job script's header cannot")
    return text if PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _format_lines(argv: list[str] | tuple[str, ...], quote: Callable[[str], str]) -> str:
    """Quote words; each option begins a new line."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(quote(word))
    return "\n  ".join(" ".join(line) for line in lines if line)


@dataclass(frozen=True)
class SubmitRequest:
    """Options for `prepare_stage`."""

    stage: str
    arguments: tuple[str, ...]
    profile: ClusterProfile
    nodes: int = 1
    min_nodes: int | None = None
    """Smallest number of nodes to continue with; None: `nodes`."""
    settings: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Number of nodes -> settings for this number."""
    array: int = 0
    """Tasks that divide the inputs for `data pack`, or the work in a stage with `shares`."""
    needs: tuple[Path, ...] = ()
    """Completion manifests from earlier stages."""
    time_limit: str | None = None
    """None: `time_limit` from `StageKind` or `ClusterProfile`."""
    ready: ReadySubmission | None = None
    """None: submit the script from here."""
    cluster: str = ""
    """--cluster, for the run's own plan; empty: no plan."""
    engine_nodes: int = 0
    """Additional nodes for engine servers."""


@dataclass(frozen=True)
class PreparedStage:
    """Checked, unwritten scripts for a stage: one `SlurmJob`, or an array and its join."""

    work: StageWork
    jobs: tuple[SlurmJob, ...]
    texts: tuple[str, ...]


def prepare_stage(request: SubmitRequest, commands: Commands,
                  check_data: Callable[[StageWork], StageWork] = lambda work: work) -> PreparedStage:
    """Build a stage's scripts, without writing a file or querying Slurm. `request`: the stage; `commands`:
    parsers for the stages' commands; `check_data`: checks a stage's data, and returns the stage with settings
    that depend on the data. Raises `UserError`: invalid stage, arguments or nodes."""
    # first the stage's parser, whose errors concern the user's own words
    work = build_stage_work(request.stage, list(request.arguments), commands,
                            bool(request.profile.gpus_per_node))
    work = check_data(dataclasses.replace(work, num_ranks=request.nodes * request.profile.tasks_per_node))
    if request.ready and not str(work.target).startswith(READY_ROOT):
        raise UserError(f"{request.stage}: writes to {work.target}, which means nothing elsewhere; "
                        "in a ready script the paths that a stage writes to begin with $WORK")
    min_nodes = request.nodes if request.min_nodes is None else request.min_nodes
    _check_nodes(work, request, min_nodes)
    layouts: dict[int, tuple[str, ...]] = {1: ()}
    if work.kind.ranks:
        layouts = find_layouts(work, request.profile, request.nodes, min_nodes, request.settings)
    _check_side_jobs(work)
    if request.engine_nodes:
        _check_engine_nodes(work, request)
    # submissions of the same code share a copy
    code = None if request.ready else work.records / _compute_code_name(ROOT)
    script = request.ready.script if request.ready else work.records / f"{request.stage}.sbatch"
    base = SlurmJob(work, request.profile, cwd=Path.cwd(), code=code, script=script, layouts=layouts,
                    needs=request.needs, time_limit=_choose_time_limit(request, work), ready=request.ready,
                    engine_nodes=request.engine_nodes, cluster=_resolve_cluster(request))
    # in submission order: each job waits for the previous job
    jobs = _split_array(base, request.array) if request.array else (base,)
    return PreparedStage(work, jobs, tuple(render_script(job) for job in jobs))


def _check_nodes(work: StageWork, request: SubmitRequest, min_nodes: int) -> None:
    if min_nodes > request.nodes:
        raise UserError(f"--min-nodes {min_nodes}: must not be above --nodes {request.nodes}; "
                        "change one of them")
    if not work.kind.ranks and request.nodes > 1:
        advice = " (data pack: --array N shares its inputs)" if request.stage == "data" else ""
        raise UserError(f"--nodes {request.nodes}: {request.stage} works on one node; leave it out{advice}")
    for count, settings in request.settings.items():
        option = f"--nodes-set {count}:{settings[0]}"
        if not work.kind.ranks:
            raise UserError(f"{option}: {request.stage} works on one node; leave it out")
        if not min_nodes <= count <= request.nodes:
            raise UserError(f"{option}: the job has never {count} nodes; see to --nodes {request.nodes} and "
                            f"--min-nodes {min_nodes}")


def _check_engine_nodes(work: StageWork, request: SubmitRequest) -> None:
    """Raise `UserError` if the stage starts no servers, or servers would leave GPUs idle."""
    if work.engines is None or request.ready:
        raise UserError(f"--engine-nodes {request.engine_nodes}: are for `submit rl-run ... --engine vllm` "
                        "without --engine-url; leave it out")
    server_gpus, node_gpus = work.engines.num_gpus, request.profile.tasks_per_node
    if node_gpus % server_gpus:
        raise UserError(f"--engine-set tp={work.engines.tp} dp={work.engines.dp}: a server takes "
                        f"{server_gpus} GPUs, which must divide the {node_gpus} of a node; servers over "
                        "several nodes are not supported")


def _resolve_cluster(request: SubmitRequest) -> str:
    """Return --cluster for the job: an absolute path, or "" for a file and a ready script."""
    if request.cluster.endswith((".yaml", ".yml")):
        return "" if request.ready else str(Path(request.cluster).resolve())
    return request.cluster


def _check_side_jobs(work: StageWork) -> None:
    """Raise `UserError` for an invalid `evaluate.background.cluster`; the run itself would only warn."""
    if work.config is None:
        return
    background = work.config.evaluate.background
    if background.tasks and background.where == "slurm":
        try:
            cluster.load_profile(background.cluster)
        except UserError as e:
            raise UserError(f"evaluate.background.cluster = {background.cluster}: "
                            f"the run could not submit its evaluation jobs ({e})") from None


def _choose_time_limit(request: SubmitRequest, work: StageWork) -> str:
    """Return --time, or the shorter of the stage's and the profile's limit.

    Raises:
        UserError: an invalid limit, or a limit that leaves no time for work before the stop signal.
    """
    defaults = [limit for limit in (work.kind.time_limit, request.profile.time_limit) if limit]
    limit = request.time_limit if request.time_limit is not None else min(defaults, key=parse_time_limit)
    lead_s = request.profile.signal_lead_s
    fix = Fix(options=("--time", f"{limit}:00:00")) if limit.isdigit() else None  # 4: hours, not minutes
    if parse_time_limit(limit) <= lead_s + SIGNAL_TOLERANCE_S:
        raise UserError(f"time limit {limit!r}: is {parse_time_limit(limit):g} s, and the job is asked to "
                        f"save signal_lead_s = {lead_s} before it ends, by Slurm up to "
                        f"{SIGNAL_TOLERANCE_S} s earlier, so no work would be done; "
                        "pass a longer --time, or a profile with a shorter signal_lead_s", fix)
    return limit


def _split_array(base: SlurmJob, count: int) -> tuple[SlurmJob, ...]:
    """Return an array job; for `data pack`, add a `data mix` job for the parts."""
    work = base.work
    argv = list(work.arguments)
    # all tasks run the same command and divide the work themselves
    if work.kind.shares and count > 0:
        return (dataclasses.replace(base, array=count),)
    if work.stage != "data" or argv[0] != "pack":
        raise UserError(f"--array {count}: is for `data pack`, whose inputs it divides, eval-lm, "
                        f"rl-generate and rl-reward; leave it out for {work.stage}")
    parser = Parser(prog="submit data pack", add_help=False)
    parser.add_argument("--input", nargs="+", action="extend", default=[])
    parser.add_argument("--output")
    # tasks differ in inputs and output only
    options, common = parser.parse_known_args(argv)
    inputs = options.input
    if not 1 < count <= len(inputs):
        raise UserError(f"--array {count}: must lie between 2 and the number of --input, {len(inputs)}; "
                        "tasks pack whole inputs")
    parts = [f"{work.target}.parts/part-{i}" for i in range(count)]
    packing = dataclasses.replace(work, arguments=tuple(common))
    joining = dataclasses.replace(work, arguments=("mix", *parts, "--output", str(work.target)))
    # exit code 0 does not prove a complete part
    needs = tuple(Path(p) / "manifest.json" for p in parts)
    return (dataclasses.replace(base, work=packing, array=count, array_inputs=tuple(inputs),
                                script=base.script.with_name(f"{base.script.stem}-parts.sbatch")),
            dataclasses.replace(base, work=joining, needs=needs))


def check_with_slurm(prepared: PreparedStage) -> None:
    """Check the partition, the scripts and the stage's active jobs.

    Raises:
        UserError: Slurm or the partition is missing, Slurm rejects a script, or the stage has an active job.
    """
    client.check_partition(prepared.jobs[0].profile.partition)
    for text in prepared.texts:
        client.check_script(text)
    # two jobs of one stage would write to the same folder
    active = client.read_active_states(list_submitted_jobs(prepared.work.records))
    if active:
        number, state = next(iter(active.items()))
        raise UserError(f"{prepared.work.target}: its job {number} is {state.lower()}; "
                        f"wait for it, or `scancel {number}`")


def submit_jobs(prepared: PreparedStage, after: list[str]) -> list[str]:
    """Write and submit a stage's scripts; return the job ids. The last job completes the stage. `prepared`:
    the checked stage; `after`: jobs that must succeed first. Raises `UserError`: the folder is not writable,
    or Slurm rejects a job."""
    records = prepared.work.records
    with translate_disk_errors(records):
        try:
            records.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{records}: cannot be made, since a file is in the way; "
                            "choose another folder") from None
        _copy_code(_get_code(prepared.jobs[0]))
    numbers: list[str] = []
    log = EventLog(records / SUBMISSIONS)
    try:
        for job, text in zip(prepared.jobs, prepared.texts, strict=True):
            write_atomically(job.script, text)
            write_atomically(job.script.with_suffix(".json"), format_json(_describe_job(job)))
            # logged at once: a kill between two submissions must not lose a job id
            numbers.append(client.submit_script(job.script, after=numbers[-1:] or after))
            log.write("submitted", job=numbers[-1], stage=job.work.stage, script=job.script.name,
                      nodes=max(job.layouts), after=numbers[-2:-1] or after)
    except UserError:
        # packed parts are useless without the job that joins them
        client.cancel_jobs(numbers)
        raise
    finally:
        log.close()
    return numbers


def _get_code(job: SlurmJob) -> Path:
    assert job.code is not None, f"{job.script}: a ready script is not submitted from here"
    return job.code


def _describe_job(job: SlurmJob) -> dict[str, Any]:
    """Return the settings in SCRIPT.json, for users and `status`."""
    return {"stage": job.work.stage, "arguments": list(job.work.arguments), "target": str(job.work.target),
            "done": str(job.work.completion), "nodes": {str(n): list(s) for n, s in job.layouts.items()},
            "profile": dataclasses.asdict(job.profile), "cwd": str(job.cwd), "code": _get_code(job).name,
            "config": job.work.config.to_dict() if job.work.config is not None else None}


def _list_sources(root: Path) -> list[tuple[Path, str]]:
    """Return (file, path relative to `root`) for `OUR_PACKAGES`."""
    return [(p, p.relative_to(root).as_posix()) for package in OUR_PACKAGES
            for p in sorted((root / package).rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


def _compute_code_name(root: Path) -> str:
    """Return `code-DIGEST`, the folder name for a copy."""
    digest = hashlib.sha256()
    for path, name in _list_sources(root):
        # separated by NUL: content that moves to another file changes the digest
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"code-{digest.hexdigest()[:12]}"


def _copy_code(folder: Path) -> None:
    """Copy the code for the job, unless a copy with this content exists."""
    if folder.is_dir():
        return
    # simultaneous submissions may copy the same code: the first copy stays
    with create_folder(folder, keep_existing=True) as temporary:
        for path, name in _list_sources(ROOT):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        # an edit during the copy: a mixture of old and new code
        if folder.name != _compute_code_name(temporary):
            raise UserError(f"{folder}: the code changed while it was copied; submit again after the edit")


def print_scripts(prepared: PreparedStage) -> None:
    for job, text in zip(prepared.jobs, prepared.texts, strict=True):
        sys.stdout.write(f"# {job.script}\n{text}\n")

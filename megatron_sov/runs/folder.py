"""The folder of a training run: paths, settings, completion state, command, and checks before a start."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, format_json, translate_disk_errors, write_atomically
from megatron_sov.base.errors import Fix, UserError, fix_missing
from megatron_sov.base.outputs import refuse_unwritable
from megatron_sov.base.settings import format_change
from megatron_sov.model.config import OptimConfig, RolloutConfig, RunConfig, from_dict
from megatron_sov.model.config.post_training import BETAS
from megatron_sov.model.families.adapters import adapter_identity
from megatron_sov.runs.checkpoints import CHECKPOINTS_FOLDER, check_run_folder
from megatron_sov.runs.launch_environment import has_launcher, is_first_rank, num_ranks, typed_command
from megatron_sov.runs.lock import LOCK, find_living_holder
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

CONFIG, COMPLETION, FAILURE, STAGES, JOBS = ("config.json", "complete.json", "gate_failed.json",
                                             "stages", "slurm")
COMMAND = "command.json"
"""File with the last start's command line, for `megatron-sov resume`."""
SETTINGS_CHANGED = "settings"
"""Event: settings or command differ from the previous start."""
MONITORING_GROUPS = ("obs", "evaluate")
"""Settings groups for monitoring; they do not affect training."""
ATTEMPTS, SUBMISSIONS = "attempts.jsonl", "jobs.jsonl"
"""Files in a folder of Slurm jobs: attempts with their exit states, and submissions."""
DATA, TOKENIZER = "data", "tokenizer"
"""Token shards packed from the text files of --data, and their tokenizer."""
ROUNDS = "rounds"
"""Training documents per round (`megatron-sov rl train`)."""
FAULTS = "faults"
"""One file per injected fault; may exist before the run's config.json."""
REFERENCE = "reference"
"""Reference log-probabilities; remain if a run is refused before its first step."""
AVERAGE = "average"
"""Average over a complete run's newest checkpoints."""
VALIDATION = "validation"
"""Rollout store with responses to held-out prompts (`megatron-sov rl run --validation`)."""
EXPORTS, EVALUATIONS = "exports", "evaluations"
"""Hugging Face exports during training, and their evaluation results."""
FIXED_OPTIM_SETTINGS = tuple(f.name for f in dataclasses.fields(OptimConfig) if f.name != "rewarm")
FIXED_ROLLOUT_SETTINGS = tuple(f.name for f in dataclasses.fields(RolloutConfig)
                if f.name not in ("rounds", "max_staleness", "deadline_s", "lease_s", "keep_rounds")
                # validation settings do not change training
                and not f.name.startswith(VALIDATION))
FIXED_SETTINGS: dict[str, tuple[str, ...] | None] = {"model": None, "objective": None,
                                                     "optim": FIXED_OPTIM_SETTINGS,
                                            "train": ("seed", "precision", "hidden_dropout"),
                                             "data": ("packing", "over_long"), "lora": None,
                                             "preference": None, "distillation": None, "policy": None,
                                             "rollout": FIXED_ROLLOUT_SETTINGS}
"""Settings group -> settings fixed on resume; None fixes the whole group."""
MAX_LISTED_SETTINGS = 8
"""Maximum --set options in an error message."""
MAX_LISTED_CHARS = 160
"""Maximum length in characters for old plus new value in an event."""


class RunFolder:
    """Paths and state files in `RUN/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def completion(self) -> dict[str, Any] | None:
        """Read a finished stage's `complete.json`, or return None."""
        file = self.path / COMPLETION
        return _read_completion(file) if file.is_file() else None

    def complete(self, content: dict[str, Any]) -> None:
        write_atomically(self.path / COMPLETION, format_json(content))

    def mark_gate_failed(self, failure: str) -> None:
        write_atomically(self.path / FAILURE, format_json({"failure": failure}))

    def failure(self) -> str | None:
        """Read the reason in `gate_failed.json`, or return None."""
        file = self.path / FAILURE
        return str(json.loads(file.read_text(encoding="utf-8"))["failure"]) if file.is_file() else None

    def clear_gate_failure(self) -> None:
        """Delete `gate_failed.json` before training continues."""
        if is_first_rank():
            # Only rank 0: a later rank might delete new files of rank 0.
            (self.path / FAILURE).unlink(missing_ok=True)

    def config(self) -> RunConfig | None:
        """Read the run's `config.json`, or return None for a new folder. Raises `UserError`: the file is
        damaged or from another version."""
        file = self.path / CONFIG
        if not file.is_file():
            return None
        try:
            return from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, UserError, RecursionError) as e:
            raise UserError(f"{file}: cannot be read as a run's settings ({e}); "
                            "restore it or choose another --run") from None

    def enter(self, config: RunConfig, resume: bool) -> None:
        """Check whether training with `config` may start in the folder; changes no files. Raises `UserError`:
        the folder contains another artifact, an unexpected run, a run with other fixed settings, or a
        complete run with fewer steps."""
        earlier = self.check_available(resume)
        if earlier is None:
            if resume:
                self._refuse_misspelt()
            return
        # Code first: a changed recipe file explains changed settings, not the reverse.
        check_code_unchanged(self.path, earlier, config)
        # Only settings that change the mathematics are fixed; layout, lengths and intervals may change.
        changed = _changed_fixed_settings(_comparable_settings(earlier), _comparable_settings(config))
        if changed:
            descriptions = [f"{name} = {old}, now it is {new}" for name, old, new in changed]
            arguments = [shlex.quote(format_change(name, old)) for name, old, _ in changed]
            if len(arguments) <= MAX_LISTED_SETTINGS:
                options = " ".join(f"--set {argument}" for argument in arguments)
            else:
                options = f"--config {shlex.quote(str(self.path / CONFIG))} in the recipe's place"
            raise UserError(f"{self.path}: was started with {'; '.join(descriptions)}; "
                            f"a resumed run keeps this ({options}), and a new --run --from it "
                            "takes another value", self._fix_by_new_run())
        completion = self.completion()
        # A stage with a passed gate is complete at any step.
        ended_early = completion is not None and (completion.get("gate") or {}).get("passed", False)
        if completion is not None and completion["step"] < config.num_steps() and not ended_early:
            raise UserError(f"{self.path}: is complete at step {completion['step']}, and train.steps = "
                            f"{config.num_steps()} asks for more; start a new --run --from it, with the "
                            "steps that it adds", self._fix_by_new_run(
                                "--set", f"train.steps={config.num_steps() - completion['step']}"))

    def _fix_by_new_run(self, *options: str) -> Fix:
        return Fix(options=(*options, "--from", str(self.path), "--run", str(self._next_free())),
                   left_out=("--resume",))

    def _next_free(self) -> Path:
        """Return the first of RUN-2, RUN-3, ... that does not exist."""
        return next(path for n in itertools.count(2)
                    if not (path := self.path.with_name(f"{self.path.name}-{n}")).exists())

    def _refuse_misspelt(self) -> None:
        """Refuse --resume of a folder that holds no run, next to a run with nearly the same name.  Jobs pass
        --resume at their first start, too."""
        if has_launcher() or "SLURM_JOB_ID" in os.environ:
            return
        fix = fix_missing(self.path)
        other = Path(fix.words[str(self.path)]) if fix and not fix.before else None
        if other is not None and (other / EVENTS).is_file():
            raise UserError(f"--run {self.path}: holds no run to resume; {other} does (without --resume a "
                            "new run begins)", fix)

    def check_available(self, resume: bool) -> RunConfig | None:
        """Return the settings of the run in the folder, or None if the folder is free. Raises `UserError`:
        the folder contains other files, or a run although `resume` is false."""
        # A refused command must not create a folder, so test the nearest existing parent.
        nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not nearest.is_dir():
            raise UserError(f"{nearest}: is a file; --run needs a folder")
        if is_first_rank():  # one rank is enough
            refuse_unwritable(nearest, f"--run {self.path}")
        earlier = self.config()
        if earlier is None:
            # Other commands or a killed first start may have created these files before config.json.
            packed_files = (COMMAND, f"{TOKENIZER}/{MANIFEST}")
            has_packed_data = any((self.path / name).is_file() for name in packed_files)
            expected = (LOCK, STAGES, ROUNDS, JOBS, FAULTS, REFERENCE, COMMAND,
                        *((DATA, TOKENIZER) if has_packed_data else ()),
                        *((self.checkpoints.name,) if resume else ()))  # from `convert from-megatron`
            if self.path.is_dir() and any(not p.name.startswith(".") and p.name not in expected
                                          for p in self.path.iterdir()):
                raise UserError(f"{self.path}: is not empty and holds no run; choose another --run")
            return None
        if not resume:
            free = ("--run", str(self._next_free()))
            if self.completion() is None:
                raise UserError(f"{self.path}: already holds a run of {earlier.recipe}; "
                                "pass --resume to continue it, or choose another --run", Fix(options=free))
            start = ("--from", str(self.path)) if earlier.objective.name == "lm" else ()
            raise UserError(f"{self.path}: already holds a complete run of {earlier.recipe}; choose another "
                            f"--run, which begins with its weights by --from {self.path}",
                            Fix(options=(*start, *free)))
        return earlier

    def has_started(self) -> bool:
        return any((self.path / name).exists() for name in (CONFIG, STAGES))

    def create(self) -> None:
        with translate_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def declare(self, config: RunConfig, step: int = 0) -> None:
        """Write the resolved `config.json` after `step` optimizer steps; from then on the folder is a run."""
        self._record_settings_change(config, step)
        # Write config.json before creating checkpoints/: after a kill in between, --resume still works.
        write_atomically(self.path / CONFIG, format_json(config.to_dict()))
        record_command(self.path)
        with translate_disk_errors(self.path):
            self.checkpoints.mkdir(exist_ok=True)

    def _record_settings_change(self, config: RunConfig, step: int) -> None:
        """Record the previous settings and command as an event, before both files are replaced."""
        old_config = self.config()
        if old_config is None or not (self.path / EVENTS).is_file():
            return
        changes = changed_settings(old_config, config)
        command_file, words, old_command = self.path / COMMAND, typed_command(), None
        if words is not None and command_file.is_file():
            recorded = command_file.read_text(encoding="utf-8")
            old_command = json.loads(recorded) if recorded != _format_command(words) else None
        if changes or old_command is not None:
            text = {"text": "; ".join(describe_changes(changes))} if changes else {}
            RunEvents(self.path).add(SETTINGS_CHANGED, step=step, was=changes, command=old_command, **text)

    def remove_unstarted(self) -> None:
        """After a refused start, delete the run's files if no step was trained."""
        events = self.path / EVENTS
        # A used folder has a living holder or contains results.
        has_steps = events.is_file() and any(event.get("step", 0) for event in read_events(events))
        is_used = has_steps or self.completion() is not None or any(self.checkpoints.glob("*"))
        if is_used or find_living_holder(self.path):
            return
        with contextlib.suppress(OSError):
            for file in (events, self.path / CONFIG, self.path / COMMAND):
                file.unlink(missing_ok=True)
            # rmdir, not rmtree: rmdir fails on a filled folder and then deletes nothing.
            self.checkpoints.rmdir()
            self.path.rmdir()

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()


def record_command(run: Path) -> None:
    """Write `command.json` if a command line started this process."""
    if (words := typed_command()) is not None:
        # ASCII escapes: arguments may contain bytes outside UTF-8.
        write_atomically(run / COMMAND, _format_command(words))


def _format_command(words: Sequence[str]) -> str:
    return json.dumps({"words": words, "folder": os.getcwd(), "processes": num_ranks(None)}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class TypedCommand:
    words: tuple[str, ...]
    """Arguments after `megatron-sov`."""
    folder: Path
    processes: int

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "TypedCommand":
        return TypedCommand(tuple(map(str, raw["words"])), Path(raw["folder"]), int(raw["processes"]))


def read_command(run: Path) -> TypedCommand:
    """Read a run's `command.json`, or the latest stage's. Raises `UserError`: no run, a run started from
    Python or by an earlier version, or a damaged file."""
    files = [file for file in (run / COMMAND, *sorted(run.glob(f"{STAGES}/*/{COMMAND}"))) if file.is_file()]
    if not files:
        if not (run / CONFIG).is_file():
            check_run_folder(run)
        raise UserError(f"{run}: has no {COMMAND}: no command line of this version began it; type the whole "
                        "command again with --resume")
    try:
        return TypedCommand.from_dict(json.loads(files[-1].read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f"{files[-1]}: is damaged ({str(e)[:200]}); type the whole command again with "
                        "--resume") from None


def check_code_unchanged(run: Path, old_config: RunConfig, new_config: RunConfig) -> None:
    """Check that user code (recipes, rewards, objectives) still has the hashes of the run's start. Raises
    `UserError`: a file has changed."""
    old_codes = {(code.kind, code.name): code for code in old_config.code}
    for code in new_config.code:
        old_code = old_codes.get((code.kind, code.name))
        if old_code is None or not old_code.files or not code.files:
            continue
        files = dict(code.files)
        # The first file may have another name now.
        files[next(iter(old_code.files))] = files.pop(next(iter(files)))
        for name, sha256 in old_code.files.items():
            if files.get(name, sha256) != sha256:
                recipe = (f", pass --config {run / CONFIG} in the recipe's place,"
                          if code.kind == "recipe" else ",")
                raise UserError(f"{run}: was started with {code.kind} {code.name} of {old_code.reference}, "
                                f"and {name} has changed since (sha256 {sha256[:12]}, "
                                f"now {files[name][:12]}); put it back as it was{recipe} or start a new "
                                "--run --from its checkpoint")


def _read_completion(file: Path) -> dict[str, Any]:
    """Read a completion manifest and check its `step` and `gate`. Raises `UserError`: the file is damaged."""
    try:
        manifest = dict(json.loads(file.read_text(encoding="utf-8")))
        if type(manifest.get("step")) is not int or not isinstance(manifest.get("gate") or {}, dict):
            raise ValueError(f"step is {manifest.get('step')!r}, gate {manifest.get('gate')!r}")
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({str(e)[:200]}); delete it and run the same "
                        "command with --resume") from None
    return manifest


def _comparable_settings(config: RunConfig) -> dict[str, Any]:
    """Return settings in comparable form: equal adapters are equal, and new defaults are removed."""
    # `all-linear` equals the list of modules it expands to.
    settings = config.to_dict() | {"lora": adapter_identity(config.lora, config.model)}
    has_beta = config.preference.method in BETAS
    settings["preference"] |= {"beta": config.preference.effective_beta if has_beta else None}
    # The default correction changed between versions; only rounds use it.
    if not config.rollout.rounds:
        settings["policy"] |= {"correction": None}
    return settings


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return settings that change the trained weights and therefore stay fixed on resume."""
    settings = _comparable_settings(config)
    return {f"{group}.{name}": settings[group][name]
            for group, names in FIXED_SETTINGS.items() for name in names or settings[group]}


def _changed_fixed_settings(old_groups: dict[str, Any], new_groups: dict[str, Any]
                            ) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value for each changed setting in `FIXED_SETTINGS`."""
    changes = []
    for group, names in FIXED_SETTINGS.items():
        for name in names or old_groups[group]:
            old = old_groups[group][name]
            # A setting that the new version lacks counts as unchanged.
            new = new_groups[group].get(name, old)
            if new != old:
                changes.append((f"{group}.{name}", old, new))
    return changes


def changed_settings(old_config: RunConfig, new_config: RunConfig) -> dict[str, list[Any]]:
    """Return setting name -> [old, new] for each difference outside the `MONITORING_GROUPS` groups."""
    old_groups, new_groups = old_config.to_dict(), new_config.to_dict()
    changes: dict[str, list[Any]] = {}
    for group, value in old_groups.items():
        if group in MONITORING_GROUPS:
            continue
        if isinstance(value, dict):
            pairs = {f"{group}.{key}": [old, new_groups[group][key]] for key, old in value.items()}
        else:  # a field outside the groups, such as the recipe's name
            pairs = {group: [value, new_groups[group]]}
        changes |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return changes


def describe_changes(changes: Mapping[str, Sequence[Any]]) -> list[str]:
    return [f"{name} was {old}, is {new}" if len(f"{old}{new}") <= MAX_LISTED_CHARS else
            f"{name} has changed" for name, (old, new) in changes.items()]


class RunEvents:
    """Event log for an existing run; with `run=None`, `add` does nothing."""

    def __init__(self, run: Path | None) -> None:
        """Check that the folder contains a run. Raises `UserError`: `events.jsonl` is missing."""
        if run is not None and not (run / EVENTS).is_file():
            raise UserError(f"--run {run}: holds no {EVENTS}, so it is not a run; "
                            "pass the folder of a training command's --run")
        self._path = None if run is None else run / EVENTS

    def last_step(self) -> int | None:
        if self._path is None:
            return None
        return max((e["step"] for e in read_events(self._path) if e["event"] == "step" and "step" in e),
                   default=None)

    def add(self, event: str, **fields: Any) -> None:
        # Open the file per event: a command that measures a run for hours holds no file open.
        log = EventLog(self._path)
        log.write(event, **fields)
        log.close()


def list_submitted_jobs(records: Path) -> list[str]:
    """Return the Slurm job numbers in `jobs.jsonl`, in submission order."""
    return [str(r["job"]) for r in read_events(records / SUBMISSIONS) if r["event"] == "submitted"]


def read_last_log_line(records: Path, number: str) -> str:
    """Return the last line in the logs of a Slurm job that recorded no attempt; "": no logs."""
    logs = [file for pattern in (f"{number}.log", f"{number}_*.log")
            for file in sorted(records.glob(pattern))]
    shown = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in logs).strip()
    return shown.splitlines()[-1].strip().removeprefix("job: ") if shown else ""


def read_started_settings(run: Path) -> RunConfig | None:
    """Return the settings from a run or its first stage, or None."""
    folders = (run, *sorted((run / STAGES).glob("*")))
    return next((config for folder in folders if (config := RunFolder(folder).config())), None)

"""A run's folder: what lies where, how it is entered, and when it counts as complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, atomic_write, disk_errors, to_json
from megatron_sov.base.errors import UserError, fix_missing
from megatron_sov.base.outputs import refuse_unwritable
from megatron_sov.model.config import OptimConfig, RolloutConfig, RunConfig, from_dict
from megatron_sov.model.config.post_training import BETAS
from megatron_sov.model.families.adapters import identity
from megatron_sov.runs.checkpoints import CHECKPOINTS_OF_A_RUN, refuse_no_run
from megatron_sov.runs.launch_environment import is_first, num_ranks, typed_command, under_launcher
from megatron_sov.runs.lock import LOCK, living_holder
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

CONFIG, COMPLETION, FAILURE, STAGES, JOBS = ("config.json", "complete.json", "gate_failed.json",
                                             "stages", "slurm")
COMMAND = "command.json"
"""The command line that began or continued the run, for `megatron-sov resume`."""
CHANGED = "settings"
"""Event of a start by other settings, or another command, than the start before."""
WATCHED = ("obs", "evaluate")
"""Parts of the settings by which a run is watched, and nothing is learned."""
ATTEMPTS, SUBMISSIONS = "attempts.jsonl", "jobs.jsonl"
"""Of a folder of Slurm jobs: how often each job's script began and how that ended, and what was submitted."""
HELD = "awaiting_gate.json"
"""The completion manifest of a stage whose last checkpoint is still to be judged."""
GATE = "gate"
"""Results of a forgetting gate; its first ones come before there is a run."""
DATA, TOKENIZER = "data", "tokenizer"
"""Token shards of the files that --data names, and the tokenizer that packed them."""
ROUNDS = "rounds"
"""Documents of the rounds of `megatron-sov rl train`."""
FAULTS = "faults"
"""Which faults have come on purpose, one file each; one may come before there is a run."""
REFERENCE = "reference"
"""What a run's reference says of its data; it outlives a run that was refused before its first step."""
AVERAGE = "average"
"""The mean of a complete run's newest checkpoints."""
VALIDATION = "validation"
"""Responses to held-out prompts, and their rewards: a rollout store (`megatron-sov rl run --validation`)."""
EXPORTS, EVALUATIONS = "exports", "evaluations"
"""Hugging Face folders of checkpoints, and the figures measured on them, beside training."""
OPTIM = tuple(f.name for f in dataclasses.fields(OptimConfig) if f.name != "rewarm")
ROLLOUT = tuple(f.name for f in dataclasses.fields(RolloutConfig)
                if f.name not in ("rounds", "max_staleness", "deadline_s", "lease_s", "keep_rounds")
                # how held-out prompts are asked changes nothing that is learned
                and not f.name.startswith(VALIDATION))
FIXED: dict[str, tuple[str, ...] | None] = {"model": None, "objective": None, "optim": OPTIM,
                                            "train": ("seed", "precision", "hidden_dropout"),
                                             "data": ("packing", "over_long"), "lora": None,
                                             "preference": None, "distillation": None, "policy": None,
                                             "rollout": ROLLOUT}
"""What a resumed run must not change: part of the config -> its settings (None: all)."""
MOST_SETTINGS = 8
"""That a message tells to type one by one."""


LONGEST_VALUES = 160
"""Characters of an old and a new value that are told of."""


class RunFolder:
    """Paths and states of RUN/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_OF_A_RUN

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step}"

    def completion(self) -> dict[str, Any] | None:
        """Return the completion manifest of a stage that is complete, else None."""
        file = self.path / COMPLETION
        if not file.is_file():
            return None
        return _declared(file)

    def complete(self, content: dict[str, Any]) -> None:
        atomic_write(self.path / COMPLETION, to_json(content))

    def hold(self, content: dict[str, Any]) -> None:
        """Note what `complete` is to declare once the last checkpoint is judged."""
        atomic_write(self.path / HELD, to_json(content))

    def held(self) -> dict[str, Any] | None:
        file = self.path / HELD
        return _declared(file) if file.is_file() else None

    def release(self) -> None:
        (self.path / HELD).unlink(missing_ok=True)

    def fail(self, failure: str) -> None:
        """Record that the stage's gate has not passed."""
        atomic_write(self.path / FAILURE, to_json({"failure": failure}))

    def failure(self) -> str | None:
        """Return what the gate did not pass by, or None."""
        file = self.path / FAILURE
        return str(json.loads(file.read_text(encoding="utf-8"))["failure"]) if file.is_file() else None

    def forget_failure(self) -> None:
        """Take back an earlier failure, or what was not judged, before the run goes on."""
        if is_first():
            # One process is enough; others might delete what rank 0 has written since.
            (self.path / FAILURE).unlink(missing_ok=True)
            self.release()

    def config(self) -> RunConfig | None:
        """Return the config that the folder was made with, or None for a new folder.

        Raises:
            UserError: the file is damaged or of another version.
        """
        file = self.path / CONFIG
        if not file.is_file():
            return None
        try:
            return from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, UserError, RecursionError) as e:
            raise UserError(f"{file}: cannot be read as a run's settings ({e}); "
                            "restore it or choose another --run") from None

    def enter(self, config: RunConfig, resume: bool) -> None:
        """Check that a run with `config` may work in this folder; leaves it as it was.

        Raises:
            UserError: the folder holds something else, a run that was not asked for, one with other settings,
                or a complete one that is shorter.
        """
        earlier = self.refuse_taken(resume)
        if earlier is None:
            if resume:
                self._refuse_misspelt()
            return
        # Before settings: a changed file of code explains changed settings, not the other way round.
        refuse_changed_code(self.path, earlier, config)
        # Only what changes the mathematics is fixed; layout, lengths and intervals may differ on a resume.
        changed = _changed(_comparable(earlier), _comparable(config))
        if changed:
            told = [f"{name} = {before}, now it is {now}" for name, before, now in changed]
            words = [shlex.quote(f"{name}={before if isinstance(before, str) else json.dumps(before)}")
                     for name, before, _ in changed]
            way = (" ".join(f"--set {word}" for word in words) if len(words) <= MOST_SETTINGS else
                   f"--config {shlex.quote(str(self.path / CONFIG))} in the recipe's place")
            raise UserError(f"{self.path}: was started with {'; '.join(told)}; resume with {way}, or start a "
                            "new --run --from its checkpoint")
        completion = self.completion()
        # A stage whose gate passed is done however many steps were planned.
        ended_early = completion is not None and (completion.get("gate") or {}).get("passed", False)
        if completion is not None and completion["step"] < config.num_steps() and not ended_early:
            raise UserError(f"{self.path}: is complete at step {completion['step']}, and train.steps = "
                            f"{config.num_steps()} asks for more; start a new --run --from it")

    def _refuse_misspelt(self) -> None:
        """Refuse --resume of a folder that holds no run, next to a run with nearly the same name.  Jobs pass
        --resume at their first start, too."""
        if under_launcher() or "SLURM_JOB_ID" in os.environ:
            return
        fix = fix_missing(self.path)
        other = Path(fix.words[str(self.path)]) if fix and not fix.before else None
        if other is not None and (other / EVENTS).is_file():
            raise UserError(f"--run {self.path}: holds no run to resume; {other} does (without --resume a "
                            "new run begins)", fix)

    def refuse_taken(self, resume: bool) -> RunConfig | None:
        """Return the settings of the run in the folder, None if it holds no run yet; leaves it as it was.

        Raises:
            UserError: the folder holds something else, or a run without `resume`.
        """
        # Nothing is created yet: a refused command leaves no folder behind. So the nearest folder that
        # exists is the one tried.
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise UserError(f"{nearest}: is a file; --run needs a folder")
        if is_first():  # thousands need not try it at once
            refuse_unwritable(nearest, f"--run {self.path}")
        earlier = self.config()
        if earlier is None:
            # What may be there before a run's config.json: other commands, or a first start that was
            # killed, put it there.
            has_packed = any((self.path / name).is_file() for name in (COMMAND, f"{TOKENIZER}/{MANIFEST}"))
            expected = (LOCK, STAGES, ROUNDS, JOBS, FAULTS, REFERENCE, GATE, COMMAND,
                        *((DATA, TOKENIZER) if has_packed else ()))
            if self.path.is_dir() and any(not p.name.startswith(".") and p.name not in expected
                                          for p in self.path.iterdir()):
                raise UserError(f"{self.path}: is not empty and holds no run; choose another --run")
            return None
        if not resume:
            raise UserError(f"{self.path}: already holds a run of {earlier.recipe}; "
                            "pass --resume to continue it, or choose another --run")
        return earlier

    def has_begun(self) -> bool:
        """Return whether the folder holds a run, or the stages of one."""
        return any((self.path / name).exists() for name in (CONFIG, STAGES))

    def create(self) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def declare(self, config: RunConfig, step: int = 0) -> None:
        """Write the resolved config: from now on the folder holds a run.

        Args:
            config: its settings.
            step: optimizer steps done before.
        """
        self._tell_change(config, step)
        # config.json comes before checkpoints/: a kill in between leaves a run that a resume can enter.
        atomic_write(self.path / CONFIG, to_json(config.to_dict()))
        record_command(self.path)
        with disk_errors(self.path):
            self.checkpoints.mkdir(exist_ok=True)

    def _tell_change(self, config: RunConfig, step: int) -> None:
        """Tell by which settings and command the steps so far were made, where those that follow are made by
        others: both files are about to be replaced."""
        before = self.config()
        if before is None or not (self.path / EVENTS).is_file():
            return
        was = changed_settings(before, config)
        file, words, earlier = self.path / COMMAND, typed_command(), None
        if words is not None and file.is_file() and file.read_text(encoding="utf-8") != _command_now(words):
            earlier = json.loads(file.read_text(encoding="utf-8"))
        if was or earlier is not None:
            text = {"text": "; ".join(tell_changes(was))} if was else {}
            RunEvents(self.path).add(CHANGED, step=step, was=was, command=earlier, **text)

    def remove_unstarted(self) -> None:
        """Take back a run that was refused before its first step, so that the mended command finds the folder
        as it was."""
        events = self.path / EVENTS
        # Any of these means that somebody works here, or that something of worth exists.
        if living_holder(self.path) or self.completion() is not None or any(self.checkpoints.glob("*")) or (
                events.is_file() and any(event.get("step", 0) for event in read_events(events))):
            return
        with contextlib.suppress(OSError):
            for file in (events, self.path / CONFIG, self.path / COMMAND):
                file.unlink(missing_ok=True)
            # rmdir, not rmtree: it fails on a folder that holds anything, and then all stays.
            self.checkpoints.rmdir()
            self.path.rmdir()

    def remove_if_empty(self) -> None:
        """Take back `create` where nothing came of it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def record_command(run: Path) -> None:
    """Write into a run's folder how it was begun, where a command line began it."""
    if (words := typed_command()) is not None:
        # ASCII: a word may hold bytes that are no UTF-8
        atomic_write(run / COMMAND, _command_now(words))


def _command_now(words: Sequence[str]) -> str:
    return json.dumps({"words": words, "folder": os.getcwd(), "processes": num_ranks(None)}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class TypedCommand:
    """What `record_command` wrote."""

    words: tuple[str, ...]
    """Behind `megatron-sov`."""
    folder: Path
    """Where it was typed."""
    processes: int
    """How many the run had."""

    @staticmethod
    def of(raw: Mapping[str, Any]) -> TypedCommand:
        return TypedCommand(tuple(map(str, raw["words"])), Path(raw["folder"]), int(raw["processes"]))


def read_command(run: Path) -> TypedCommand:
    """Return how a run was begun, or went on last; a run of stages keeps it in the folders of these.

    Raises:
        UserError: it is no run, was begun by Python code or an earlier version, or the file is damaged.
    """
    files = [file for file in (run / COMMAND, *sorted(run.glob(f"{STAGES}/*/{COMMAND}"))) if file.is_file()]
    if not files:
        if not (run / CONFIG).is_file():
            if not run.exists():
                raise UserError(f"{run}: does not exist; pass the folder of a training command's --run "
                                "(`megatron-sov status FOLDER` lists the runs in a folder)")
            refuse_no_run(run)
        raise UserError(f"{run}: has no {COMMAND}: no command line of this version began it; type the whole "
                        "command again with --resume")
    try:
        return TypedCommand.of(json.loads(files[-1].read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f"{files[-1]}: is damaged ({str(e)[:200]}); type the whole command again with "
                        "--resume") from None


def refuse_changed_code(run: Path, before: RunConfig, now: RunConfig) -> None:
    """Refuse to go on with code of the user's own that is not what the run was started with.

    Raises:
        UserError: a file has changed; the message names it, and how to go on.
    """
    earlier = {(code.kind, code.name): code for code in before.code}
    for code in now.code:
        started = earlier.get((code.kind, code.name))
        if started is None or not started.files or not code.files:
            continue
        files = dict(code.files)
        # the file itself, whatever it is called now
        files[next(iter(started.files))] = files.pop(next(iter(files)))
        for name, sha256 in started.files.items():
            if files.get(name, sha256) != sha256:
                recipe = (f", pass --config {run / CONFIG} in the recipe's place,"
                          if code.kind == "recipe" else ",")
                raise UserError(f"{run}: was started with {code.kind} {code.name} of {started.reference}, "
                                f"and {name} has changed since (sha256 {sha256[:12]}, "
                                f"now {files[name][:12]}); put it back as it was{recipe} or start a new "
                                "--run --from its checkpoint")


def _declared(file: Path) -> dict[str, Any]:
    """Return what a completion manifest says.

    Raises:
        UserError: it is no such manifest.
    """
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        if type(found.get("step")) is not int or not isinstance(found.get("gate") or {}, dict):
            raise ValueError(f"step is {found.get('step')!r}, gate {found.get('gate')!r}")
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({str(e)[:200]}); delete it and run the same "
                        "command with --resume") from None
    return found


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Return settings as two runs are compared by them: what adapters adapt counts, however it is spelled,
    and a default that a newer version has changed counts only where the run uses it."""
    # `all-linear` and the list that it stands for are one setting.
    told = config.to_dict() | {"lora": identity(config.lora, config.model)}
    told["preference"] |= {"beta": config.preference.strength if config.preference.method in BETAS else None}
    # The default of the correction changed between versions; without rounds nothing reads it.
    if not config.rollout.rounds:
        told["policy"] |= {"correction": None}
    return told


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that change what is learned, which a resumed run keeps."""
    told = _comparable(config)
    return {f"{part}.{name}": told[part][name]
            for part, names in FIXED.items() for name in names or told[part]}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value of every fixed setting that differs."""
    return [(f"{part}.{name}", before[part][name], now[part][name])
            for part, names in FIXED.items() for name in (names or before[part])
            if now[part].get(name, before[part][name]) != before[part][name]]


def changed_settings(before: RunConfig, now: RunConfig) -> dict[str, list[Any]]:
    """Return old and new value of every setting that differs, by its name; those of `WATCHED` are left
    out."""
    then, told = before.to_dict(), now.to_dict()
    return {name: [old, new] for part, value in then.items() if part not in WATCHED
            for name, old, new in ([(f"{part}.{key}", old, told[part][key]) for key, old in value.items()]
                                   if isinstance(value, dict) else [(part, value, told[part])])
            if old != new}


def tell_changes(was: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return a sentence for each change of `changed_settings`."""
    return [f"{name} was {old}, is {new}" if len(f"{old}{new}") <= LONGEST_VALUES else
            f"{name} is another one" for name, (old, new) in was.items()]


class RunEvents:
    """The events of a run that exists; with None for the folder nothing is recorded."""

    def __init__(self, run: Path | None) -> None:
        """Look at the folder; changes nothing.

        Raises:
            UserError: it holds no run.
        """
        if run is not None and not (run / EVENTS).is_file():
            raise UserError(f"--run {run}: holds no {EVENTS}, so it is not a run; "
                            "pass the folder of a training command's --run")
        self._path = None if run is None else run / EVENTS

    def last_step(self) -> int | None:
        steps = ([e["step"] for e in read_events(self._path) if e["event"] == "step" and "step" in e]
                 if self._path else [])
        return max(steps, default=None)

    def add(self, event: str, **fields: Any) -> None:
        """Append one event."""
        # Opened for one line: commands that measure a run hours later hold no file of it open.
        log = EventLog(self._path)
        log.write(event, **fields)
        log.close()


def submitted_jobs(records: Path) -> list[str]:
    """Return the numbers of the Slurm jobs that a folder of jobs has, in the order of their submission."""
    return [str(r["job"]) for r in read_events(records / SUBMISSIONS) if r["event"] == "submitted"]


def last_words(records: Path, number: str) -> str:
    """Return the last line of a job's own log, which has some even where the job could not record an
    attempt; empty: none."""
    logs = [file for pattern in (f"{number}.log", f"{number}_*.log")
            for file in sorted(records.glob(pattern))]
    said = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in logs).strip()
    return said.splitlines()[-1].strip().removeprefix("job: ") if said else ""


def resumed_settings(run: Path) -> RunConfig | None:
    """Return the settings of a run that began, or of its first stage; None: there is none."""
    folders = (run, *sorted((run / STAGES).glob("*")))
    return next((config for folder in folders if (config := RunFolder(folder).config())), None)

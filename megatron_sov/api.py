"""Commands as functions, for scripts and notebooks: the same programs, in processes of their own.

A process that has computed with torch cannot be forked into ranks, and a notebook has; so nothing is started
from here but a command, which says on stderr what it always says.
"""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import format_json, read_manifest
from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, UserError
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events
from megatron_sov.work.processes.children import start_command

AnyPath = str | Path
Paths = AnyPath | Sequence[AnyPath] | Mapping[str, AnyPath]
"""A file, several, or name -> file."""
Data = AnyPath | Sequence[AnyPath] | Mapping[AnyPath, float]
Settings = Mapping[str, Any] | Sequence[str]
_ERRORS: dict[int, type[Exception]] = {
    ExitCode.USER_ERROR: UserError, ExitCode.GATE_FAILED: GateFailed, ExitCode.STOPPED: StopRequested}
_MARKS = ("error: ", "gate: ", "stopped: ")


def pretrain(config: RunConfig, data: Mapping[AnyPath, float] | Iterable[AnyPath], run: AnyPath, *,
             nproc: int | None = None, start_from: AnyPath | None = None, resume: bool = False,
             plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Train a model as `megatron-sov pretrain --config` does, and wait for its end.

    Args:
        config: settings, e.g. of `recipes.get`, changed by `apply_settings` or `dataclasses.replace`.
        data: folders of token shards, or folder -> weight.
        run: folder of the run.
        nproc: local processes.
        start_from: checkpoint, run or Hugging Face folder.
        resume: continue the run that is in `run`.
        plugins: files of your own, FILE.py:NAME, for a family or objective that `config` has by name.

    Returns:
        The completion manifest: step, tokens, wall_s, checkpoint (relative to `run`), checkpoint_sha256.

    Raises:
        UserError: something has to be changed first; the message says what.
        StopRequested: it was asked to stop, and everything is saved; call it again with `resume=True`.
        RuntimeError: it failed otherwise; its last words stand on stderr.
    """
    weights = dict(data) if isinstance(data, Mapping) else dict.fromkeys(data, 1.0)
    with tempfile.TemporaryDirectory(prefix="sov-config-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(format_json(config.to_dict()), encoding="utf-8")
        words = ["pretrain", "--config", str(file), "--run", str(run)]
        words += [word for path, weight in weights.items() for word in ("--data", f"{path}:{float(weight)}")]
        words += _plugins(plugins) + ([] if nproc is None else ["--nproc", str(nproc)])
        words += (([] if start_from is None else ["--from", str(start_from)])
                  + (["--resume"] if resume else []))
        sys.stdout.write(_run(words))
    completion = RunFolder(Path(run)).completion()
    assert completion is not None, f"{run}: pretrain ended with 0"
    return completion


def sft(start_from: AnyPath, data: Data, run: AnyPath, *, settings: Settings = (), **options: Any
        ) -> dict[str, Any]:
    """Fine-tune on chats as `megatron-sov sft` does, and wait for its end.

    Args:
        start_from: checkpoint, run or Hugging Face folder.
        data: a folder of token shards, several, or folder -> weight.
        run: folder of the run.
        settings: what --set takes: {"train.epochs": 2}, or ["train.epochs=2"].
        options: further options of the command, by name: recipe="typhoon-s-8b", nproc=2, resume=True,
            gate="quiz"; a list repeats an option (plugin=["my_objective.py:Mine"]).

    Returns:
        The completion manifest, as of `pretrain`.

    Raises:
        UserError, StopRequested, RuntimeError: as `pretrain`.
        GateFailed: its gate has not passed.
    """
    return _train("sft", run, _stage_words(start_from, data, settings), options)


def prefer(start_from: AnyPath, data: Data, run: AnyPath, *, method: str = "dpo", settings: Settings = (),
           **options: Any) -> dict[str, Any]:
    """Learn from preferences as `megatron-sov prefer` does, by DPO or another `method`; else as `sft`."""
    return _train("prefer", run, [*_stage_words(start_from, data, settings), "--method", method], options)


def distill(start_from: AnyPath, teacher: AnyPath, data: Data, run: AnyPath, *, settings: Settings = (),
            **options: Any) -> dict[str, Any]:
    """Learn a teacher's distributions as `megatron-sov distill` does; else as `sft`."""
    words = [*_stage_words(start_from, data, settings), "--teacher", str(teacher)]
    return _train("distill", run, words, options)


def rl_run(start_from: AnyPath, prompts: AnyPath, reward: str, store: AnyPath, run: AnyPath, *,
           reward_settings: Settings = (), settings: Settings = (), **options: Any) -> dict[str, Any]:
    """Learn from rewards as `megatron-sov rl run` does: write, judge and train all rounds; else as `sft`.

    Args:
        start_from: the first policy.
        prompts: a file of prompts, one JSON object a line.
        reward: its name, or FILE.py:NAME of your own.
        store: folder of the rollouts.
        run: folder of the run.
        reward_settings: of the reward, what --reward-set takes.
        settings: as of `sft`.
        options: as of `sft`.
    """
    words = [*_stage_words(start_from, (), settings), "--prompts", str(prompts), "--reward", reward,
             "--store", str(store), *_settings(reward_settings, "--reward-set")]
    return _train("rl run", run, words, options)


def train_tokenizer(inputs: Paths, output: AnyPath, *, vocab_size: int, preset: str = "solar-open",
                    **options: Any) -> dict[str, Any]:
    """Train a tokenizer as `sov-tokenizer train` does; returns what its manifest says of it."""
    words = ["train", "--preset", preset, "--vocab-size", str(vocab_size), *_inputs(inputs), "--output",
             str(output)]
    _run([*words, *_options(options)], "tokenizer.cli")
    return read_manifest(Path(output), "tokenizer").content


def pack(tokenizer: AnyPath, inputs: Paths, output: AnyPath, *, format: str = "text", **options: Any
         ) -> dict[str, Any]:
    """Write token shards as `sov-data pack` does; returns what their manifest says of them.

    Args:
        tokenizer: its folder.
        inputs: files or folders, or name -> file.
        output: the folder to write.
        format: text, chat, preference or prompt.
        options: further options of the command, by name, e.g. heldout=0.1.
    """
    words = ["pack", "--tokenizer", str(tokenizer), "--format", format, *_inputs(inputs), "--output",
             str(output)]
    _run([*words, *_options(options)], "data_prep.cli")
    return read_manifest(Path(output), "tokens").content


def evaluate(model: AnyPath, tasks: str | Sequence[str], output: AnyPath, **options: Any) -> dict[str, Any]:
    """Evaluate on benchmarks as `megatron-sov eval lm` does.

    Args:
        model: checkpoint, run or Hugging Face folder.
        tasks: names of tasks.
        output: the file of results.
        options: further options of the command, by name, e.g. limit=100.

    Returns:
        What the file holds: `tasks` by name, each with its metrics and their intervals.
    """
    named = tasks if isinstance(tasks, str) else ",".join(tasks)
    _run(["eval", "lm", str(model), "--tasks", named, "--output", str(output), *_options(options)])
    found: dict[str, Any] = json.loads(Path(output).read_text(encoding="utf-8"))
    return found


def generate(model: AnyPath, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0,
             chat: bool = False, **options: Any) -> list[str]:
    """Continue prompts as `megatron-sov generate` does; the model is loaded once for all of them.

    Args:
        model: checkpoint, run (its newest one) or Hugging Face folder.
        prompts: texts to continue.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most probable token.
        chat: ask each prompt as a user's message.
        options: further options of the command, by name.

    Returns:
        What the model wrote after each prompt, in their order.

    Raises:
        UserError: something has to be changed first; the message says what.
        RuntimeError: it failed otherwise; its last words are on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="sov-prompts-") as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
        words = ["generate", str(model), "--prompts", str(file), "--json", *_options(
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "chat": chat, **options})]
        return [found["text"] for found in json.loads(_run(words))]


def read_meters(run: AnyPath, *, frame: bool = False) -> Any:
    """Return a run's steps as a table: a row for each step, with its loss, its rate and every meter.

    Args:
        run: its folder.
        frame: True: a `pandas.DataFrame`; else a list of dicts.

    Raises:
        UserError: there is no such run, or `frame` is asked for and pandas is not installed.
    """
    rows = [{**_plain(event), **(event.get("losses") or {}), **(event.get("meters") or {})}
            for event in final_step_events(_events(run))]
    return _table(rows, frame=frame)


def read_rounds(run: AnyPath, *, frame: bool = False) -> Any:
    """Return the rounds of a run of `rl_run` as a table, see `read_meters`: reward, components, lengths."""
    rounds = [event for event in _events(run) if event["event"] == "round"]
    means = [event.get("means") or {} for event in rounds]
    rows = [{"round": event.get("round"), "step": event.get("step"), "documents": event.get("documents"),
             **_plain(mean), **(mean.get("components") or {})}
            for event, mean in zip(rounds, means, strict=True)]
    return _table(rows, frame=frame)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an event is a number or a text of its own."""
    return {key: value for key, value in fields.items() if not isinstance(value, dict | list)
            and key != "event"}


def _events(run: AnyPath) -> list[dict[str, Any]]:
    file = Path(run) / EVENTS
    if not file.is_file():
        raise UserError(f"{run}: holds no run ({EVENTS}); pass the folder of a run")
    return list(read_events(file))


def _table(rows: list[dict[str, Any]], *, frame: bool) -> Any:
    if not frame:
        return rows
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise UserError("frame = True: needs pandas, which is not installed; install it, or take the list of "
                        "dicts") from None
    return pandas.DataFrame(rows)


def _train(command: str, run: AnyPath, words: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a training command; returns its completion manifest."""
    recipe = [str(value) for key, value in options.items() if key == "recipe" and value is not None]
    further = _options({key: value for key, value in options.items() if key != "recipe"})
    sys.stdout.write(_run([*command.split(), *recipe, *words, "--run", str(run), *further]))
    completion = RunFolder(Path(run)).completion()
    assert completion is not None, f"{run}: {command} ended with 0"
    return completion


def _stage_words(start_from: AnyPath, data: Data, settings: Settings) -> list[str]:
    return ["--from", str(start_from), *_data(data), *_settings(settings, "--set")]


def _data(data: Data) -> list[str]:
    if isinstance(data, Mapping):
        return [word for path, weight in data.items() for word in ("--data", f"{path}:{float(weight)}")]
    paths = [data] if isinstance(data, str | Path) else data
    return [word for path in paths for word in ("--data", str(path))]


def _inputs(inputs: Paths) -> list[str]:
    named = ([f"{name}={path}" for name, path in inputs.items()] if isinstance(inputs, Mapping)
             else [str(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)])
    return [word for path in named for word in ("--input", path)]


def _settings(settings: Settings, option: str) -> list[str]:
    """Return the words of settings; values that are no text are written as JSON."""
    lines = ([f"{key}={value if isinstance(value, str) else json.dumps(value)}"
              for key, value in settings.items()] if isinstance(settings, Mapping) else settings)
    return [word for line in lines for word in (option, line)]


def _options(options: Mapping[str, Any]) -> list[str]:
    """Return the words of options by name: True is a flag, a list repeats, None and False leave out."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [flag] if one is True else [] if one is None or one is False else [flag, str(one)]
    return words


def _plugins(references: Sequence[str]) -> list[str]:
    return [word for reference in references for word in ("--plugin", reference)]


def _run(words: list[str], module: str = "megatron_sov") -> str:
    """Run a command of a module, pass on what it says on stderr, and return what it prints."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, start_command(
            [sys.executable, "-m", module, *words], stdout=printed,
            stderr=subprocess.PIPE) as process:
        assert process.stderr is not None, words
        lines = io.TextIOWrapper(process.stderr, encoding="utf-8", errors="replace")
        try:
            message = _passed_on(lines)
        except KeyboardInterrupt:
            process.terminate()  # it saves, and ends with the code for that
            message = _passed_on(lines)
        code = process.wait()
        if code in _ERRORS:
            raise _ERRORS[code](message or f"megatron-sov {words[0]} ended with exit code {code}")
        if code:
            raise RuntimeError(f"megatron-sov {words[0]} ended with exit code {code}; "
                               "its last words stand on stderr")
        printed.seek(0)
        return printed.read()


def _passed_on(lines: Iterable[str]) -> str:
    """Write lines to stderr as they come; returns the last message among them, without its mark."""
    message = ""
    for line in lines:
        sys.stderr.write(line)
        message = line if line.startswith(_MARKS) else message + line if message else ""
    return message.partition(": ")[2].strip()

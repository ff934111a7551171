"""Commands as functions for scripts and notebooks; a function starts a new process for the command.

A process that has used torch cannot fork ranks, and a notebook usually has. The commands write to stderr as
usual.
"""

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
from megatron_sov.base.settings import format_change
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events
from megatron_sov.work.processes.children import start_command

AnyPath = str | Path
Paths = AnyPath | Sequence[AnyPath] | Mapping[str, AnyPath]
"""A file, several files, or name -> file."""
Data = AnyPath | Sequence[AnyPath] | Mapping[AnyPath, float]
Settings = Mapping[str, Any] | Sequence[str]
_ERRORS: dict[int, type[Exception]] = {
    ExitCode.USER_ERROR: UserError, ExitCode.GATE_FAILED: GateFailed, ExitCode.STOPPED: StopRequested}
_MARKS = ("error: ", "gate: ", "stopped: ")


def pretrain(config: RunConfig, data: Mapping[AnyPath, float] | Iterable[AnyPath], run: AnyPath, *,
             nproc: int | None = None, start_from: AnyPath | None = None, resume: bool = False,
             plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Train a model by `megatron-sov pretrain --config`, and wait until the run ends.

    Args:
        config: settings, e.g. `recipes.get(...)`, changed by `apply_settings` or `dataclasses.replace`.
        data: folders of token shards, or folder -> weight.
        run: folder of the run.
        nproc: local processes.
        start_from: checkpoint, run or Hugging Face folder.
        resume: continue the run in `run`.
        plugins: your families and objectives in `config`, as FILE.py:NAME.

    Returns:
        The completion manifest: step, tokens, wall_s, checkpoint (relative to `run`), checkpoint_sha256.

    Raises:
        UserError: an input needs a change, which the message names.
        StopRequested: stopped by a signal with everything saved; call again with `resume=True`.
        RuntimeError: another failure; see stderr.
    """
    weights = dict(data) if isinstance(data, Mapping) else dict.fromkeys(data, 1.0)
    with tempfile.TemporaryDirectory(prefix="sov-config-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(format_json(config.to_dict()), encoding="utf-8")
        words = ["--config", str(file), *_format_data(weights)]
        options = {"plugin": list(plugins), "nproc": nproc, "from": start_from, "resume": resume}
        return _run_training("pretrain", run, words, options)


def sft(start_from: AnyPath, data: Data, run: AnyPath, *, settings: Settings = (), **options: Any
        ) -> dict[str, Any]:
    """Fine-tune on chats by `megatron-sov sft`, and wait until the run ends.

    Args:
        start_from: checkpoint, run or Hugging Face folder.
        data: a folder of token shards, several folders, or folder -> weight.
        run: folder of the run.
        settings: values of --set: {"train.epochs": 2}, or ["train.epochs=2"].
        options: further options of the command: recipe="typhoon-s-8b", nproc=2, resume=True, gate="quiz";
            a list repeats an option (plugin=["my_objective.py:Mine"]).

    Returns:
        The completion manifest, see `pretrain`.

    Raises:
        UserError, StopRequested, RuntimeError: see `pretrain`.
        GateFailed: the stage's gate failed.
    """
    return _run_training("sft", run, _format_stage(start_from, data, settings), options)


def prefer(start_from: AnyPath, data: Data, run: AnyPath, *, method: str = "dpo", settings: Settings = (),
           **options: Any) -> dict[str, Any]:
    """Learn from preferences by `megatron-sov prefer`; arguments, result and errors as in `sft`."""
    words = [*_format_stage(start_from, data, settings), "--method", method]
    return _run_training("prefer", run, words, options)


def distill(start_from: AnyPath, teacher: AnyPath, data: Data, run: AnyPath, *, settings: Settings = (),
            **options: Any) -> dict[str, Any]:
    """Learn the distributions of `teacher` by `megatron-sov distill`; otherwise as `sft`."""
    words = [*_format_stage(start_from, data, settings), "--teacher", str(teacher)]
    return _run_training("distill", run, words, options)


def rl_run(start_from: AnyPath, prompts: AnyPath, reward: str, store: AnyPath, run: AnyPath, *,
           reward_settings: Settings = (), settings: Settings = (), **options: Any) -> dict[str, Any]:
    """Generate, judge and train by `megatron-sov rl run`; result and errors as in `sft`.

    Args:
        start_from: checkpoint, run or Hugging Face folder of the first policy.
        prompts: JSONL file of prompts.
        reward: name of a reward, or FILE.py:NAME.
        store: folder of the rollouts.
        run: folder of the run.
        reward_settings: values of --reward-set.
        settings: see `sft`.
        options: see `sft`.
    """
    words = [*_format_stage(start_from, (), settings), "--prompts", str(prompts), "--reward", reward,
             "--store", str(store), *_format_settings(reward_settings, "--reward-set")]
    return _run_training("rl run", run, words, options)


def train_tokenizer(inputs: Paths, output: AnyPath, *, vocab_size: int, preset: str = "solar-open",
                    **options: Any) -> dict[str, Any]:
    """Train a tokenizer by `sov-tokenizer train`, and return the manifest's content."""
    words = ["train", "--preset", preset, "--vocab-size", str(vocab_size), *_format_inputs(inputs),
             "--output", str(output)]
    _run_command([*words, *_format_options(options)], "tokenizer.cli")
    return read_manifest(Path(output), "tokenizer").content


def pack(tokenizer: AnyPath, inputs: Paths, output: AnyPath, *, format: str = "text", **options: Any
         ) -> dict[str, Any]:
    """Write token shards by `sov-data pack`, and return the manifest's content.

    Args:
        tokenizer: folder of the tokenizer.
        inputs: files or folders, or name -> file.
        output: folder to write.
        format: text, chat, preference or prompt.
        options: further options of the command, e.g. heldout=0.1.
    """
    words = ["pack", "--tokenizer", str(tokenizer), "--format", format, *_format_inputs(inputs), "--output",
             str(output)]
    _run_command([*words, *_format_options(options)], "data_prep.cli")
    return read_manifest(Path(output), "tokens").content


def evaluate(model: AnyPath, tasks: str | Sequence[str], output: AnyPath, **options: Any) -> dict[str, Any]:
    """Evaluate a model on benchmarks by `megatron-sov eval lm`.

    Args:
        model: checkpoint, run or Hugging Face folder.
        tasks: names of tasks.
        output: file of results.
        options: further options of the command, e.g. limit=100.

    Returns:
        Content of `output`: `tasks` by name, with metrics and intervals.
    """
    task_names = tasks if isinstance(tasks, str) else ",".join(tasks)
    _run_command(["eval", "lm", str(model), "--tasks", task_names, "--output", str(output),
                  *_format_options(options)])
    results: dict[str, Any] = json.loads(Path(output).read_text(encoding="utf-8"))
    return results


def generate(model: AnyPath, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0,
             chat: bool = False, **options: Any) -> list[str]:
    """Continue prompts by `megatron-sov generate`, which loads the model once.

    Args:
        model: checkpoint, run (its newest checkpoint) or Hugging Face folder.
        prompts: texts to continue.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most probable token.
        chat: frame each prompt as a user's message.
        options: further options of the command.

    Returns:
        Continuations in the order of `prompts`.

    Raises:
        UserError, RuntimeError: see `pretrain`.
    """
    with tempfile.TemporaryDirectory(prefix="sov-prompts-") as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
        words = ["generate", str(model), "--prompts", str(file), "--json", *_format_options(
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "chat": chat, **options})]
        return [row["text"] for row in json.loads(_run_command(words))]


def read_meters(run: AnyPath, *, frame: bool = False) -> Any:
    """Return a row per step in `run`: loss, learning rate and meters.

    Args:
        run: folder of the run.
        frame: return a `pandas.DataFrame`, not a list of dicts.

    Raises:
        UserError: no run in `run`, or `frame` without pandas.
    """
    rows = [{**_get_scalars(event), **(event.get("losses") or {}), **(event.get("meters") or {})}
            for event in final_step_events(_read_run_events(run))]
    return _to_table(rows, frame=frame)


def read_rounds(run: AnyPath, *, frame: bool = False) -> Any:
    """Return a row per round in an RL run: reward, components and lengths; see `read_meters`."""
    rounds = [event for event in _read_run_events(run) if event["event"] == "round"]
    means = [event.get("means") or {} for event in rounds]
    rows = [{"round": event.get("round"), "step": event.get("step"), "documents": event.get("documents"),
             **_get_scalars(mean), **(mean.get("components") or {})}
            for event, mean in zip(rounds, means, strict=True)]
    return _to_table(rows, frame=frame)


def _get_scalars(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if not isinstance(value, dict | list)
            and key != "event"}


def _read_run_events(run: AnyPath) -> list[dict[str, Any]]:
    file = Path(run) / EVENTS
    if not file.is_file():
        raise UserError(f"{run}: holds no run ({EVENTS}); pass the folder of a run")
    return list(read_events(file))


def _to_table(rows: list[dict[str, Any]], *, frame: bool) -> Any:
    if not frame:
        return rows
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise UserError("frame = True: needs pandas, which is not installed; install it, or take the list of "
                        "dicts") from None
    return pandas.DataFrame(rows)


def _run_training(command: str, run: AnyPath, words: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a training command and return the completion manifest."""
    recipe = [str(value) for key, value in options.items() if key == "recipe" and value is not None]
    further = _format_options({key: value for key, value in options.items() if key != "recipe"})
    sys.stdout.write(_run_command([*command.split(), *recipe, *words, "--run", str(run), *further]))
    completion = RunFolder(Path(run)).completion()
    assert completion is not None, f"{run}: {command} ended with 0"
    return completion


def _format_stage(start_from: AnyPath, data: Data, settings: Settings) -> list[str]:
    return ["--from", str(start_from), *_format_data(data), *_format_settings(settings, "--set")]


def _format_data(data: Data) -> list[str]:
    if isinstance(data, Mapping):
        return [word for path, weight in data.items() for word in ("--data", f"{path}:{float(weight)}")]
    paths = [data] if isinstance(data, str | Path) else data
    return [word for path in paths for word in ("--data", str(path))]


def _format_inputs(inputs: Paths) -> list[str]:
    if isinstance(inputs, Mapping):
        texts = [f"{name}={path}" for name, path in inputs.items()]
    else:
        texts = list(map(str, [inputs] if isinstance(inputs, str | Path) else inputs))
    return [word for text in texts for word in ("--input", text)]


def _format_settings(settings: Settings, option: str) -> list[str]:
    """Format settings as words; non-text values become JSON."""
    lines = settings
    if isinstance(settings, Mapping):
        lines = [format_change(key, value) for key, value in settings.items()]
    return [word for line in lines for word in (option, line)]


def _format_options(options: Mapping[str, Any]) -> list[str]:
    """Format options as words: True is a flag, a list repeats the option, None and False omit the option."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is True:
                words.append(flag)
            elif item is not None and item is not False:
                words += [flag, str(item)]
    return words


def _run_command(words: list[str], module: str = "megatron_sov") -> str:
    """Run a program, forward stderr, and return stdout."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, start_command(
            [sys.executable, "-m", module, *words], stdout=printed, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None, words
        lines = io.TextIOWrapper(process.stderr, encoding="utf-8", errors="replace")
        try:
            message = _forward_lines(lines)
        except KeyboardInterrupt:
            process.terminate()  # the command saves, and ends with `ExitCode.STOPPED`
            message = _forward_lines(lines)
        code = process.wait()
        if code in _ERRORS:
            raise _ERRORS[code](message or f"megatron-sov {words[0]} ended with exit code {code}")
        if code:
            raise RuntimeError(f"megatron-sov {words[0]} ended with exit code {code}; see stderr")
        printed.seek(0)
        return printed.read()


def _forward_lines(lines: Iterable[str]) -> str:
    """Forward lines to stderr, and return the last message without a `_MARKS` prefix."""
    message = ""
    for line in lines:
        sys.stderr.write(line)
        if line.startswith(_MARKS):
            message = line
        elif message:
            message += line
    return message.partition(": ")[2].strip()

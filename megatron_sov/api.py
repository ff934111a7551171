"""Commands as functions, for scripts and notebooks: the same programs, in processes of their own.

A process that has computed with torch cannot be forked into ranks, and a notebook has; so nothing is started
from here but a command, which says on stderr what it always says.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, UserError
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.folder import RunFolder
from megatron_sov.work.processes.children import start_command

AnyPath = str | Path
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
        file.write_text(to_json(config.to_dict()), encoding="utf-8")
        words = ["pretrain", "--config", str(file), "--run", str(run)]
        words += [word for path, weight in weights.items() for word in ("--data", f"{path}:{float(weight)}")]
        words += _plugins(plugins) + ([] if nproc is None else ["--nproc", str(nproc)])
        words += (([] if start_from is None else ["--from", str(start_from)])
                  + (["--resume"] if resume else []))
        sys.stdout.write(_run(words))
    completion = RunFolder(Path(run)).completion()
    assert completion is not None, f"{run}: pretrain ended with 0"
    return completion


def generate_text(model: AnyPath, prompts: Sequence[str], *, max_new_tokens: int = 64,
                  temperature: float = 0.0, nproc: int | None = None) -> list[str]:
    """Continue prompts as `megatron-sov generate` does; the model is loaded once for all of them.

    Args:
        model: checkpoint, run (its newest one) or Hugging Face folder.
        prompts: texts to continue.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most probable token.
        nproc: local processes, for a checkpoint.

    Returns:
        What the model wrote behind each prompt, in their order.

    Raises:
        UserError: something has to be changed first; the message says what.
        RuntimeError: it failed otherwise; its last words stand on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="sov-prompts-") as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
        words = (["generate", str(model), "--prompts", str(file), "--max-new-tokens", str(max_new_tokens),
                  "--json", "--temperature", str(temperature)]
                 + ([] if nproc is None else ["--nproc", str(nproc)]))
        return [found["text"] for found in json.loads(_run(words))]


def _plugins(references: Sequence[str]) -> list[str]:
    return [word for reference in references for word in ("--plugin", reference)]


def _run(words: list[str]) -> str:
    """Run a command, pass on what it says on stderr, and return what it prints."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, start_command(
            [sys.executable, "-m", "megatron_sov", *words], stdout=printed,
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

"""Small models that are trained on mixtures, each by `megatron-sov pretrain` in a process and folder of
its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, disk_errors, to_json
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.obs.events import EVENTS, read_events
from megatron_sov.work.commands import end_commands, start_command
from megatron_sov.work.parts import part_folder

RESULT = "result.json"
"""What is left of a model: the losses on held-out documents."""
LOG = "log.txt"
PHASE = "proxy"
CODE_VERSION = 1
"""Raised when the same mixture and settings would give another loss."""
DEFAULTS = ("train.num_threads=1", "train.eval_every_steps=0", "train.keep_checkpoints=1",
            "train.checkpoint_every_steps=1000000", "data.max_epochs=0")
"""Settings that the search's own go before: one thread each, so that losses do not depend on the machine's
cores, and nothing written on the way."""
SHOWN_LINES = 8
_POLL_S = 0.05
_STOP_S = 20.0
"""For a model that was asked to stop to save itself."""

Losses = dict[str, float]
"""Source -> bits per byte of its held-out documents."""


@dataclass(frozen=True)
class ProxySettings:
    """What all small models of a search have in common."""

    recipe: str
    """Recipe, or FILE.py:NAME."""
    data: tuple[tuple[Path, str], ...]
    """Folders of token shards, each with the hash of its manifest."""
    settings: tuple[str, ...]
    """key=value, as --set takes them."""
    steps: int
    """Optimizer steps."""
    seq_len: int
    """Tokens of a sample."""
    seed: int
    """Seed of weights and order."""
    start_from: str = ""
    """What each starts from; "": initial weights."""
    files_sha256: tuple[str, ...] = ()
    """Hashes of the recipe's own file, and of the manifest of what each starts from."""


def key_of(settings: ProxySettings, blend: dict[str, float]) -> str:
    """Return the name of a model's folder: a hash of everything that its losses depend on; where data lies is
    no part of it."""
    facts = {**vars(settings), "data": [sha256 for _, sha256 in settings.data], "blend": blend,
             "code_version": CODE_VERSION}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def command(settings: ProxySettings, blend: dict[str, float], run: Path) -> list[str]:
    """Return the arguments of `megatron-sov` that train one model, or go on with it."""
    phase = {"name": PHASE, "seq_len": settings.seq_len,
             "blend": {name: share for name, share in blend.items() if share > 0}}
    chosen = (*DEFAULTS, f"train.seed={settings.seed}", *settings.settings, f"train.steps={settings.steps}",
              f"data.phases={json.dumps([phase])}")
    return ["pretrain", settings.recipe, "--run", str(run), "--resume",
            *(["--from", settings.start_from] if settings.start_from else []),
            *(part for path, _ in settings.data for part in ("--data", str(path))),
            *(part for setting in chosen for part in ("--set", setting))]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `megatron-sov` in a process that ends with this one; what it writes goes into `log`."""
    with open(log, "ab") as out:
        return start_command([sys.executable, "-m", "megatron_sov", *arguments], stdout=out, stderr=out,
                             ends_with_this=True)


Start = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]


class Proxies:
    """Trains models, and remembers those that are trained.

    Args:
        work: folder that keeps one folder for each model; a killed search finds them again.
        settings: what they have in common.
        workers: how many are trained at a time.
        start: starts one.
    """

    def __init__(self, work: Path, settings: ProxySettings, workers: int, start: Start = start) -> None:
        self._work, self._settings, self._workers, self._start = work, settings, workers, start

    def losses(self, blends: Sequence[dict[str, float]], done: Callable[[], object]) -> list[Losses]:
        """Return the losses of a model trained on each blend, source -> share.

        Args:
            blends: what they are trained on.
            done: called as each is there.

        Raises:
            UserError: one could not be trained; those that are complete stay.
        """
        folders = [part_folder(self._work, key_of(self._settings, blend)) for blend in blends]
        waiting = {folder: blend for folder, blend in zip(folders, blends, strict=True)
                   if not (folder / RESULT).is_file()}
        for _ in range(len(folders) - len(waiting)):
            done()
        running: dict[Path, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    folder, blend = next(iter(waiting.items()))
                    del waiting[folder]
                    with disk_errors(folder):
                        folder.mkdir(parents=True, exist_ok=True)
                        running[folder] = self._start(command(self._settings, blend, folder / "run"),
                                                      folder / LOG)
                for folder, process in list(running.items()):
                    if process.poll() is not None:
                        del running[folder]
                        self._finish(folder, process.returncode)
                        done()
                time.sleep(_POLL_S)
        finally:
            end_commands(list(running.values()), _STOP_S)
        return [_result(folder) for folder in folders]

    def _finish(self, folder: Path, code: int) -> None:
        """Keep the losses of a model that has ended, and delete the rest of it."""
        if code != ExitCode.OK:
            raise UserError(f"a small model could not be trained (exit code {code}): "
                            f"{_last_words(folder / LOG)}; all it wrote is in {folder / LOG}")
        evaluated = [e for e in read_events(folder / "run" / EVENTS) if e["event"] == "eval"]
        losses = {name: float(found["bits_per_byte"]) for name, found in evaluated[-1]["heldout"].items()
                  } if evaluated else {}
        with disk_errors(folder):
            atomic_write(folder / RESULT, to_json(losses))
            shutil.rmtree(folder / "run", ignore_errors=True)


def _result(folder: Path) -> Losses:
    try:
        raw: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return {str(name): float(loss) for name, loss in raw.items()}
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{folder / RESULT}: cannot be read ({e}); delete {folder}, and run the command "
                        "again") from None


def _last_words(log: Path) -> str:
    """Return what a command said of its end: its error, or the last line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        return f"its log cannot be read ({e.strerror})"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[errors[-1]:][:SHOWN_LINES] if errors else lines[-1:]
    return " ".join(said)[:1000].removeprefix("error: ")

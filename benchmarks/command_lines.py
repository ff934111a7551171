"""Run this project's commands in benchmarks, and write the settings and rows that they read."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PROGRAMS = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> its module."""


def run_command(log: Path, module: str, *arguments: str | Path) -> None:
    """Run `python -m MODULE ARGUMENTS` on one thread, and append its output to the file `log`.

    Raises:
        SystemExit: the command failed; the message has the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [module, *map(str, arguments)]
    with open(log, "a") as output:
        code = subprocess.run([sys.executable, "-W", "ignore", "-m", *words], stdout=output, stderr=output,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    if code:
        raise SystemExit(f"{log}: {' '.join(words)} ended with exit code {code}\n{log.read_text()[-2000:]}")


def format_settings(*settings: str) -> list[str]:
    """Return the words `--set SETTING` for all settings."""
    return [word for setting in settings for word in ("--set", setting)]


def format_single_phase(seq_len: int) -> str:
    """Return the setting of a single data phase with rows of `seq_len` tokens."""
    return f'data.phases=[{{"name": "main", "seq_len": {seq_len}}}]'


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, and create the folder of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

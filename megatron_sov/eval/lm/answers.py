"""Answers of one model on disk, kept as they come: what was answered once is never asked again.

`CACHE/<model>/` holds a file for each process that wrote, a JSON object per line.  Several jobs may share the
folder; a kill leaves a torn last line at most, which counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sov.artifacts import disk_errors
from megatron_sov.eval.lm.requests import Answer

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: an answer of a million tokens is shorter."""


def folder_of(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Return where a model's answers lie.

    Args:
        cache: folder of all models' answers.
        identity: JSON values on which answers depend beside the request: the model, and how it is run.
    """
    return cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class Answers:
    """What a model has answered so far, by the keys of requests.

    Args:
        folder: this model's, see `folder_of`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Answer] = {}
        self._file = -1
        self._read_bytes: dict[Path, int] = {}
        self.reread()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, key: str) -> Answer:
        return self._found[key]

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; a kill behind this loses none of them.

        Raises:
            UserError: the disk is full, or nothing can be written there.
        """
        lines = "".join(json.dumps({"key": key, **answer}) + "\n" for key, answer in answers.items())
        with disk_errors(self.folder):
            if self._file < 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.folder / f"{uuid.uuid4().hex}.jsonl",
                                     os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            left = memoryview(lines.encode())
            while left:  # in one call to the system, unless a disk takes it in parts
                left = left[os.write(self._file, left):]
        self._found |= answers

    def note(self, key: str, answer: Answer) -> None:
        """Take note of an answer for this time alone: another evaluation asks again."""
        self._found[key] = answer

    def reread(self) -> None:
        """Take in what has been written since, by this process or others."""
        for file in sorted(self.folder.glob("*.jsonl")):
            if file.stat().st_size > self._read_bytes.get(file, 0):
                self._read(file)

    def _read(self, file: Path) -> None:
        with open(file, "rb") as f:
            f.seek(self._read_bytes.get(file, 0))
            while line := f.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n"):
                    return  # torn by a kill, or not written to its end yet
                self._read_bytes[file] = f.tell()
                try:
                    raw = json.loads(line)
                    key = raw.pop("key")
                except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
                    continue  # of a disk that lost a part; it is asked again
                if isinstance(key, str) and _is_answer(raw):
                    self._found[key] = raw


def _is_answer(raw: dict[str, Any]) -> bool:
    """Return whether a line holds a likelihood or a text; a part of one must not count as a score."""
    likelihood = type(raw.get("logprob")) in (int, float) and isinstance(raw.get("greedy"), bool)
    return likelihood or (isinstance(raw.get("text"), str)
                          and isinstance(raw.get("finish_reason"), (str, type(None))))

"""The steps of a file as a pipeline over samples, and the texts of a record that each source of it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.curate.decontamination.step import collect_text
from data_prep.curate.pipeline.pipeline_file import Pipeline, read_pipeline
from data_prep.synth.generator import Kind
from megatron_sov.base.documents.messages import BadRecord, Messages
from megatron_sov.base.documents.records import RecordReading, parse_record
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.settings import (
    LocatedDocument, ProblemCode, SettingsProblem, parse_located_yaml, read_settings_text, to_problem)

SAMPLES, ANSWERS, CONTEXT, INPUT = "samples", "answers", "context", "input"
SOURCES = (SAMPLES, ANSWERS, CONTEXT, INPUT)
"""samples: all that a record says, without system turns; answers: what an assistant says in chats; context:
system turns, each once; input: what the generator was given."""
TASK_FIELDS = ("prompt", "question", "problem", "query", "instruction", "request", "user", "text", "messages")
"""Fields of a task, or of an input, that say what is asked, where it has them."""
MAX_TEXT_BYTES = 32 << 20
"""Of one sample; a longer one is none."""


class NoSample(Exception):
    """A record that no later command would take; says why."""


def texts_of(kind: Kind, record: Mapping[str, Any]) -> dict[str, str]:
    """Return source -> text, of those that a record has.

    Raises:
        NoSample: it is malformed, empty, or too long.
    """
    try:
        found = dict(_texts(kind, record))
        size_bytes = sum(len(text.encode()) for text in found.values())
    except BadRecord as e:
        raise NoSample(str(e)) from None
    except UnicodeEncodeError:
        raise NoSample("holds half of a surrogate pair, which is no character") from None
    if size_bytes > MAX_TEXT_BYTES:
        raise NoSample(f"has {size_bytes:,} bytes of text, at most {MAX_TEXT_BYTES:,} are taken")
    if not found.get(SAMPLES, "").strip() and kind != "task":  # a task may be a world alone
        raise NoSample("holds no text")
    return {name: text for name, text in found.items() if text.strip()}


def _texts(kind: Kind, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if kind == "task":
        yield SAMPLES, asked_in(record)
        return
    # pairs are prompts with two answers: read as preferences, so that the chosen one is judged
    is_pair = kind == "prompt" and {"chosen", "rejected"} <= record.keys()
    document = parse_record(dict(record), "", 0, RecordReading("preference" if is_pair else kind))
    if kind == "text":
        yield SAMPLES, document.text
        return
    yield SAMPLES, "\n\n".join(_said((*document.messages, *document.chosen), "user", "assistant", "tool"))
    yield CONTEXT, "\n\n".join(_said(document.messages, "system"))
    if kind == "chat":
        if not any(message.role == "assistant" for message in document.messages):
            raise NoSample("has no message of an assistant, so nothing could be learned from it")
        yield ANSWERS, "\n\n".join(_said(document.messages, "assistant"))


def _said(messages: Messages, *roles: str) -> Iterator[str]:
    """Yield thoughts and contents of some roles; calls are no text."""
    for message in messages:
        if message.role in roles:
            yield from filter(None, (message.reasoning, message.content))


def asked_in(record: Mapping[str, Any]) -> str:
    """Return what a record asks, or says, in the fields that such records have."""
    return "\n\n".join(filter(str.strip, (collect_text(record.get(name)) for name in TASK_FIELDS)))


DEFAULTS = Path(__file__).parent / "defaults"
"""Files of steps: one for each kind of record, and for generators that need others."""
SHARD_BYTES = 64_000_000


def check_problems(checks: Path | None) -> list[SettingsProblem]:
    """Return the mistakes in the file of --checks; None: there is none."""
    if checks is None:
        return []
    if not checks.is_file():
        return [SettingsProblem(ProblemCode.FILE, "--checks", "does not exist", checks,
                                f"pass a YAML file, e.g. a copy of {DEFAULTS / 'chat.yaml'}")]
    try:
        read_steps(checks, dict.fromkeys(SOURCES))
    except UserError as e:
        return [to_problem(str(e))]
    return []


def steps_file(checks: Path | None, generator: str, kind: str) -> Path:
    """Return the file of --checks, else that of the generator, else that of its kind of records."""
    if checks is not None:
        return checks
    own = DEFAULTS / f"{generator}.yaml"
    return own if own.is_file() else DEFAULTS / f"{kind}.yaml"


def read_steps(file: Path, folders: Mapping[str, Path | None]) -> Pipeline:
    """Return the steps of a file as a pipeline.

    Args:
        file: YAML with `steps`.
        folders: source -> folder of its texts; None: nothing will be run.

    Raises:
        UserError: the file has mistakes; all of them are named, by line.
    """
    located = parse_located_yaml(read_settings_text(file))
    raw = located.value
    if not isinstance(raw, dict) or set(raw) != {"steps"} or not isinstance(raw["steps"], list):
        more = [f"{file}:{problem.line}: {problem.sentence}" for problem in located.problems]
        raise UserError(format_problems(f"--checks {file}", more) if more else
                        f"--checks {file}: must be a mapping with the list `steps`, and nothing else; "
                        "sources and output are the run's")
    # a file is written for all kinds of runs: steps for sources that this one lacks go
    located = _of_sources(located, tuple(folders))
    located.value = {
        "name": "checks", "shard_bytes": SHARD_BYTES, "on_bad": "refuse",
        "sources": [{"name": name, "path": [str((folder or file).absolute())],
                     # the input has the higher priority: of equal texts the sample goes
                     "format": "jsonl" if folder else "auto", "priority": int(name == INPUT)}
                    for name, folder in folders.items()],
        "steps": located.value["steps"]}
    return read_pipeline(file, located)


def _of_sources(located: LocatedDocument, names: Sequence[str]) -> LocatedDocument:
    """Return steps whose `only.sources` names none that this run lacks; a step for such sources alone is left
    out.  A name that no run has stays, and is told as a mistake."""
    steps: list[Any] = []
    lines = {place: line for place, line in located.lines.items() if place[:1] != ("steps",)}
    for i, entry in enumerate(located.value["steps"]):
        only = entry.get("only") if isinstance(entry, dict) else None
        asked = only.get("sources") if isinstance(only, dict) else None
        if isinstance(asked, list):
            here = [name for name in asked if name in names or name not in SOURCES]
            if asked and not here:
                continue
            entry = {**entry, "only": {**only, "sources": here}} if isinstance(only, dict) else entry
        # places move up where a step is left out; messages still name the line in the file
        lines |= {("steps", len(steps), *place[2:]): line for place, line in located.lines.items()
                  if place[:2] == ("steps", i)}
        steps.append(entry)
    return LocatedDocument({"steps": steps}, lines, list(located.problems))

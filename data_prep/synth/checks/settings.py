"""Step files as pipelines over samples, and a record's texts for each pipeline source."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.curate.decontamination.step import collect_text
from data_prep.curate.pipeline.pipeline_file import Pipeline, check_libraries, read_pipeline
from data_prep.synth.samples import Kind
from megatron_sov.base.documents.messages import BadRecord, Messages
from megatron_sov.base.documents.records import RecordReading, parse_record
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.settings import (
    LocatedDocument, ProblemCode, SettingsProblem, parse_located_yaml, read_settings_text, to_problem)

SAMPLES, ANSWERS, INPUT = "samples", "answers", "input"
SOURCES = (SAMPLES, ANSWERS, INPUT)
"""samples: a record's text without system turns; answers: assistant turns in chats; input: the generator's
input."""
TASK_FIELDS = ("prompt", "question", "problem", "query", "instruction", "request", "user", "text", "messages")
"""Fields in tasks and inputs that may hold the question."""
DEFAULTS = Path(__file__).parent / "defaults"
"""Step files named by generator or `Kind`."""
SHARD_BYTES = 64_000_000


class NoSample(Exception):
    """A record that no later command accepts; the message is the reason."""


def extract_texts(kind: Kind, record: Mapping[str, Any]) -> dict[str, str]:
    """Return source -> text for a record's non-empty texts. Raises `NoSample`: the record is malformed or
    empty."""
    try:
        texts = dict(_iter_texts(kind, record))
    except BadRecord as e:
        raise NoSample(str(e)) from None
    if not texts.get(SAMPLES, "").strip() and kind != "task":  # a task may consist of a world
        raise NoSample("holds no text")
    return {name: text for name, text in texts.items() if text.strip()}


def _iter_texts(kind: Kind, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if kind == "task":
        yield SAMPLES, extract_question(record)
        return
    document = parse_record(dict(record), "", 0, RecordReading(kind))
    if kind == "text":
        yield SAMPLES, document.text
        return
    yield SAMPLES, _join_turns(document.messages, "user", "assistant", "tool")
    if kind == "chat":
        if not any(message.role == "assistant" for message in document.messages):
            raise NoSample("has no message of an assistant, so nothing could be learned from it")
        yield ANSWERS, _join_turns(document.messages, "assistant")


def _join_turns(messages: Messages, *roles: str) -> str:
    """Join thoughts and contents for `roles`, without tool calls."""
    texts = [text for message in messages if message.role in roles
             for text in (message.reasoning, message.content)]
    return "\n\n".join(filter(None, texts))


def extract_question(record: Mapping[str, Any]) -> str:
    """Join the texts in `TASK_FIELDS`."""
    return "\n\n".join(filter(str.strip, (collect_text(record.get(name)) for name in TASK_FIELDS)))


def find_check_problems(checks: Path | None) -> list[SettingsProblem]:
    """Return the problems in a `--checks` file; None: no file."""
    if checks is None:
        return []
    if not checks.is_file():
        return [SettingsProblem(ProblemCode.FILE, "--checks", "does not exist", checks,
                                f"pass a YAML file, e.g. a copy of {DEFAULTS / 'chat.yaml'}")]
    try:
        check_libraries(read_steps(checks, dict.fromkeys(SOURCES)), checks)
    except UserError as e:
        return [to_problem(str(e))]
    return []


def choose_steps_file(checks: Path | None, generator: str, kind: str) -> Path:
    """Return `checks`, or else the packaged file for the generator or `Kind`."""
    if checks is not None:
        return checks
    packaged_file = DEFAULTS / f"{generator}.yaml"
    return packaged_file if packaged_file.is_file() else DEFAULTS / f"{kind}.yaml"


def read_steps(file: Path, folders: Mapping[str, Path | None]) -> Pipeline:
    """Read a step file as a pipeline.

    Args:
        file: YAML with `steps`.
        folders: source -> folder of its texts; None: the pipeline will not run.

    Raises:
        UserError: the file has problems, each with its line.
    """
    located = parse_located_yaml(read_settings_text(file))
    raw = located.value
    if not isinstance(raw, dict) or set(raw) != {"steps"} or not isinstance(raw["steps"], list):
        problems = [f"{file}:{problem.line}: {problem.sentence}" for problem in located.problems]
        raise UserError(format_problems(f"--checks {file}", problems) if problems else
                        f"--checks {file}: must be a mapping with the list `steps`, and nothing else; "
                        "sources and output are the run's")
    # the same file serves all kinds of runs: drop steps for missing sources
    located = _select_steps(located, tuple(folders))
    located.value = {
        "name": "checks", "shard_bytes": SHARD_BYTES, "on_bad": "refuse",
        "sources": [{"name": name, "path": [str((folder or file).absolute())],
                     # the input has the higher priority: of equal texts the sample is dropped
                     "format": "jsonl" if folder else "auto", "priority": int(name == INPUT)}
                    for name, folder in folders.items()],
        "steps": located.value["steps"]}
    return read_pipeline(file, located)


def _select_steps(located: LocatedDocument, sources: Sequence[str]) -> LocatedDocument:
    """Drop missing sources from `only.sources`, and steps with missing sources only.

    Names outside `SOURCES` stay, so that `read_pipeline` reports the mistake.
    """
    steps: list[Any] = []
    lines = {place: line for place, line in located.lines.items() if place[:1] != ("steps",)}
    for i, entry in enumerate(located.value["steps"]):
        only = entry.get("only") if isinstance(entry, dict) else None
        names = only.get("sources") if isinstance(only, dict) else None
        if isinstance(only, dict) and isinstance(names, list):
            selected = [name for name in names if name in sources or name not in SOURCES]
            if names and not selected:
                continue
            entry = {**entry, "only": {**only, "sources": selected}}
        # indices shift after a dropped step, and messages still name the line in the file
        lines |= {("steps", len(steps), *place[2:]): line for place, line in located.lines.items()
                  if place[:2] == ("steps", i)}
        steps.append(entry)
    return LocatedDocument({"steps": steps}, lines, list(located.problems))

"""Logs of inspect-ai (`.eval`, `.json`) as results of the form that `eval lm` writes.

The library is not needed. A log may be a stranger's: nothing of it is run or unpacked to a file; of the
archive only members with the names that are known are read, each within a limit of size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import zstandard

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.results import (
    EvaluatedModel, Metric, ResultItem, ResultSample, TaskSampling, TaskScores, score_name)
from megatron_sov.eval.statistics import mean_of

MAX_MEMBER_BYTES, MAX_LOG_BYTES, MAX_SAMPLES = 512 << 20, 16 << 30, 1_000_000
ZSTANDARD = 93
"""Compression that the library writes and Python's zipfile reads from 3.14 on."""
HEADER, REDUCTIONS, START = "header.json", "reductions.json", "_journal/start.json"
SAMPLE = re.compile(r"samples/[^/\\]+\.json")
SPREADS = {"stderr", "bootstrap_stderr", "std", "var"}
"""Metrics that say how sure another one is, or how items vary."""
MEANS = {"accuracy", "mean"}
"""Metrics that are means of the items."""
WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
"""The library's words for scores -> what it counts them as."""
LIMITS = ("message_limit", "token_limit", "turn_limit", "time_limit", "working_limit", "cost_limit")
CUT = {"max_tokens": "length", "model_length": "length"}
"""Reasons to stop of the library -> ours."""
CLOSE = 1e-9
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
           NotImplementedError, EOFError, OSError, zipfile.BadZipFile, zstandard.ZstdError, zlib.error,
           struct.error)


@dataclass(frozen=True)
class ScoredLog:
    """What one log holds."""

    task: str
    scores: TaskScores
    items: list[ResultItem]
    model: EvaluatedModel
    version: str
    """Of the library that wrote it."""
    sha256: str
    """Of the log."""
    notes: list[str] = field(default_factory=list)
    """What could not be computed."""


@dataclass
class _Asked:
    """One sample of the task, over its epochs."""

    doc: dict[str, Any]
    cluster_fields: Mapping[str, Any]
    answers: dict[int, tuple[ResultSample, dict[str, Any]]] = field(default_factory=dict)
    """Epoch -> what was answered, and scorer -> value."""
    errors: list[str] = field(default_factory=list)


def read_log(path: Path) -> ScoredLog:
    """Return the scores of a log whose evaluation has ended.

    Args:
        path: `.eval`, or `.json` in the form of the library's older logs.

    Raises:
        UserError: it cannot be read, is no log, is damaged, too large, or of an evaluation that has not
            ended.
    """
    try:
        size = path.stat().st_size
        if size > MAX_LOG_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than the {MAX_LOG_BYTES:,} of a log")
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if is_archive:
                with zipfile.ZipFile(file) as archive:
                    return _scored(path, *_of_archive(path, archive, file))
            return _scored(path, *_of_json(file))
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); pass a log of inspect-ai") from None
    except _DAMAGE as e:
        raise UserError(f"{path}: is no log of inspect-ai, or is damaged ({e!r:.200}); pass a .eval or .json "
                        "file that `inspect eval` wrote") from None


def _of_json(file: IO[bytes]) -> tuple[dict[str, Any], Any, Iterable[Any]]:
    raw = file.read(MAX_MEMBER_BYTES + 1)
    if len(raw) > MAX_MEMBER_BYTES:
        raise ValueError(f"more than {MAX_MEMBER_BYTES:,} bytes of JSON")
    log = json.loads(raw)
    return log, log.get("reductions"), log.get("samples") or []


def _of_archive(path: Path, archive: zipfile.ZipFile, file: IO[bytes]
                ) -> tuple[dict[str, Any], Any, Iterable[Any]]:
    """Return the header, the reductions and the samples, which are read one at a time."""
    # a name may be there twice, and the library reads the last one
    members = {member.filename: member for member in archive.infolist()}
    if HEADER not in members:
        if START in members:
            raise _unfinished(path, "started")
        raise ValueError(f"has no {HEADER}")
    samples = [member for name, member in members.items() if SAMPLE.fullmatch(name)]
    if len(samples) > MAX_SAMPLES:
        raise ValueError(f"{len(samples):,} samples, more than {MAX_SAMPLES:,}")
    reductions = json.loads(_read(members[REDUCTIONS], archive, file)) if REDUCTIONS in members else None
    return (json.loads(_read(members[HEADER], archive, file)), reductions,
            (json.loads(_read(member, archive, file)) for member in samples))


def _read(member: zipfile.ZipInfo, archive: zipfile.ZipFile, file: IO[bytes]) -> bytes:
    """Return the content of a member, of the size and checksum that the archive says."""
    if member.file_size > MAX_MEMBER_BYTES or member.compress_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{member.filename}: {member.file_size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    if member.compress_type != ZSTANDARD:
        with archive.open(member) as content:
            return content.read(MAX_MEMBER_BYTES)
    file.seek(member.header_offset)
    head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise ValueError(f"{member.filename}: is not where the archive says")
    file.seek(sum(struct.unpack("<HH", head[26:30])), 1)
    # several frames: the library cuts large members
    with zstandard.ZstdDecompressor().stream_reader(file.read(member.compress_size),
                                                    read_across_frames=True) as reader:
        found = reader.read(member.file_size + 1)
    if len(found) != member.file_size or zlib.crc32(found) != member.CRC:
        raise ValueError(f"{member.filename}: differs from its size or checksum")
    return found


def _unfinished(path: Path, status: str, why: str = "") -> UserError:
    return UserError(f"{path}: the evaluation has not ended well (status {status}{why}); go on with it by "
                     "`inspect eval-retry`, or by the same `megatron-sov eval inspect`")


def _scored(path: Path, log: Mapping[str, Any], reductions: Any, samples: Iterable[Any]) -> ScoredLog:
    if log["status"] != "success":
        error = log.get("error") or {}
        raise _unfinished(path, _text(log["status"]), f": {_text(error['message']):.200}" if error else "")
    spec, results, notes = log["eval"], log.get("results") or {}, list[str]()
    asked = _by_item(samples)
    task, found = _text(spec["task"]), results.get("scores") or []
    items, metrics = _figures(task, found, asked, _reduced(reductions), notes)
    failed = [item for item in items if item.failed]
    if failed:
        notes.append(f"{len(failed)} of {len(items)} items have no score; of the first: {failed[0].failed}")
    config = spec.get("config") or {}
    limit = config.get("limit")
    docs = [item.doc_sha256 for item in items]
    definition = [task, spec.get("task_version"), spec.get("task_args"), spec.get("solver"),
                  spec.get("solver_args"), spec.get("scorers"), docs]
    answers = [answer for one in asked.values() for answer, _ in one.answers.values()]
    told = {name: config[name] for name in LIMITS if config.get(name) is not None}
    scores = TaskScores(
        _hash(definition), "generate_until", len(items), metrics,
        prompt_hash=_hash([one.doc["input"] for one in asked.values()]), chat_template=True,
        sampling=_sampling(log, config), agent_limits=told or None,
        judge=", ".join(dict.fromkeys(_text(score["scorer"]) for score in found)) or None,
        limit=limit if isinstance(limit, int) else None, failed=len(failed),
        at_limit=sum(answer.finish_reason == "length" for answer in answers))
    return ScoredLog(task, scores, items, _model(spec), _text((spec.get("packages") or {}).get(
        "inspect_ai", "unknown")), sha256_file(path), [f"{task}: {note}" for note in notes])


def _by_item(samples: Iterable[Any]) -> dict[str, _Asked]:
    """Return the samples by the name of their item, in the order of names, numbers by their size."""
    found: dict[str, _Asked] = {}
    for sample in samples:
        name = _text(sample["id"])
        doc = {key: sample.get(key) for key in ("input", "choices", "target")}
        one = found.setdefault(name, _Asked(doc, sample.get("metadata") or {}))
        epoch = int(sample["epoch"])
        if epoch in one.answers or one.doc != doc:
            raise ValueError(f"sample {name} is there twice, epoch {epoch}")
        output, attached = sample.get("output") or {}, sample.get("attachments") or {}
        choice = (output.get("choices") or [{}])[0]
        reason = "length" if sample.get("limit") else choice.get("stop_reason")
        said = output.get("completion") or (choice.get("message") or {}).get("content") or ""
        values = {_text(scorer): score["value"] for scorer, score in (sample.get("scores") or {}).items()}
        only = number_of(next(iter(values.values()))) if len(values) == 1 else None
        ended = CUT.get(str(reason), None if reason is None else _text(reason))
        one.answers[epoch] = ResultSample(_words(said, attached), ended, only), values
        if sample.get("error"):
            one.errors.append(" ".join(_text(sample["error"]["message"]).replace("\\n", " ").split())[:500])
    return dict(sorted(found.items(), key=lambda pair: [int(part) if part.isdecimal() else part
                                                        for part in re.split(r"(\d{1,18})", pair[0])]))


def _reduced(reductions: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Return scorer and reducer -> item -> its value over all epochs."""
    return {(_text(one["scorer"]), _text(one.get("reducer") or "")):
            {_text(sample["sample_id"]): sample["value"] for sample in one["samples"]}
            for one in reductions or []}


def _figures(task: str, found: Sequence[Mapping[str, Any]], asked: Mapping[str, _Asked],
             reduced: Mapping[tuple[str, str], Mapping[str, Any]], notes: list[str]
             ) -> tuple[list[ResultItem], tuple[Metric, ...]]:
    values: dict[str, dict[str, float]] = {name: {} for name in asked}
    metrics = []
    clusters: dict[str, str] = {}
    for score in found:
        scorer, name, reducer = (_text(score.get(key) or "") for key in ("scorer", "name", "reducer"))
        behind = name if reducer in ("", "mean") else f"{name} {reducer}"
        of_items = _values(asked, reduced.get((scorer, reducer)), scorer, name)
        if clustered := [field for key, metric in score["metrics"].items() if key in SPREADS
                         and (field := (metric.get("params") or {}).get("cluster"))]:
            clusters |= {item: _text(one.cluster_fields[clustered[0]]) for item, one in asked.items()}
        for key, metric in score["metrics"].items():
            if key in SPREADS:
                continue
            value = number_of(metric["value"])
            made = Metric(_text(key), value, behind)
            if metric["name"] in MEANS and value is not None and of_items:
                mean = mean_of([*of_items.values()], [(clusters.get(item) or item) for item in of_items])
                if math.isclose(mean.value, value, rel_tol=CLOSE, abs_tol=CLOSE):
                    made = Metric(_text(key), value, behind, stderr=mean.standard_error,
                                  interval=mean.interval, clusters=mean.num_clusters)
                    for item, of_item in of_items.items():
                        values[item][score_name(made.label, behind)] = of_item
                else:
                    notes.append(f"{key} of {behind} is no mean of its items' values; it has no interval")
            metrics.append(made)
    items = [_item(task, name, one, values[name], clusters.get(name)) for name, one in asked.items()]
    return items, tuple(metrics)


def _values(asked: Mapping[str, _Asked], reduced: Mapping[str, Any] | None, scorer: str, name: str
            ) -> dict[str, float]:
    """Return item -> its value over all epochs, of those that have one."""
    def picked(value: Any) -> float | None:
        # a scorer of several values: each has a score of its name
        return number_of(value.get(name) if isinstance(value, dict) else value)

    if reduced is not None:
        told = {item: picked(value) for item, value in reduced.items() if item in asked}
    else:
        told = {}
        for item, one in asked.items():
            each = [value for _, values in one.answers.values() if scorer in values
                    and (value := picked(values[scorer])) is not None]
            told[item] = math.fsum(each) / len(each) if each else None
    return {item: value for item, value in told.items() if value is not None}


def _item(task: str, name: str, one: _Asked, scores: Mapping[str, float], cluster: str | None) -> ResultItem:
    target = one.doc["target"]
    answer = ", ".join(map(_text, target)) if isinstance(target, list) else _text(target or "")
    failed = one.errors[0] if len(one.errors) == len(one.answers) else None
    return ResultItem(task, name, _hash(one.doc), cluster, _words(one.doc["input"], {}), answer, dict(scores),
                      tuple(answer for _, (answer, _) in sorted(one.answers.items())), failed)


def number_of(value: Any) -> float | None:
    """Return what a score counts as, as the library counts it; None: it counts as nothing (the library would
    take 0, with a warning) or is not finite."""
    if isinstance(value, str):
        found = WORDS.get(value, WORDS.get(value.lower()) if len(value) > 1 else None)
        if found is not None:
            return found
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _sampling(log: Mapping[str, Any], config: Mapping[str, Any]) -> TaskSampling:
    plan = (log.get("plan") or {}).get("config") or {}
    told = {**(log["eval"].get("model_generate_config") or {}),
            **{name: value for name, value in plan.items() if value is not None}}

    def of(name: str, default: float) -> float:
        value = told.get(name)
        return default if value is None else float(value)

    # where nothing is set, the interface's own defaults hold; 0 tokens: no limit was asked for
    return TaskSampling(of("temperature", 1.0), of("top_p", 1.0), int(of("top_k", 0)),
                        int(of("max_tokens", 0)), int(of("seed", 0)), int(config.get("epochs") or 1))


def _model(spec: Mapping[str, Any]) -> EvaluatedModel:
    """Return the model as the log names it; of its address only what holds no key."""
    address, name = urlsplit(_text(spec.get("model_base_url") or "")), _text(spec["model"])
    where = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}" if address.netloc else ""
    return EvaluatedModel(f"{where} {name}".strip(), _hash([where, name]), "endpoint")


def _words(said: Any, attached: Mapping[str, Any]) -> str:
    """Return the text of a content: a text, parts of one, or messages."""
    if isinstance(said, str):
        return _text(attached.get(said.removeprefix("attachment://"), said))
    parts: Iterator[str] = (_words(part.get("text", part.get("content", "")), attached) for part in said)
    return "\n".join(part for part in parts if part)


def _text(value: Any) -> str:
    """Return a value as text that UTF-8 can hold."""
    return str(value).encode("utf-8", "replace").decode()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

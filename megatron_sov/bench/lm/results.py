"""The result file of `eval lm` and its items file, OUT.json and OUT.items.jsonl."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from megatron_sov.base.artifacts import format_json, sha256_file, write_output
from megatron_sov.base.documents.rows import format_json_line
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import align_columns
from megatron_sov.base.settings import Finite

FORMAT_VERSION, KIND = 1, "eval-lm"
DEFAULT_MODE = "default"
"""Leaves a reasoning model's mode to its chat template; the other modes are `thinking` and `no-thinking`."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of an items file."""
T = TypeVar("T")
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class EvaluatedModel:
    path: str
    hash: str
    """Hash from `hash_model_folder`."""
    kind: str
    """`checkpoint` or `huggingface`."""
    step: int | None = None
    run: str | None = None
    """Run folder with events for the scores."""


@dataclass(frozen=True)
class TaskSampling:
    """How the model generated; not used for likelihoods."""

    temperature: float = 0.0
    """0 for greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    max_tokens: int = 256
    seed: int = 0
    samples: int = 1
    """Generations per item."""


@dataclass(frozen=True)
class Metric:
    name: str
    """lm-eval's name (`acc`), or `avg@k`, `pass@k`, `cons@k`."""
    value: Finite | None
    """None: no item has a score, or the metric divides by zero."""
    filter: str = "none"
    """lm-eval's filter for the answers."""
    k: int | None = None
    """For `avg@k`, `pass@k` and `cons@k`."""
    stderr: float | None = None
    """Standard error over clusters; None if unknown."""
    interval: tuple[float, float] | None = None
    """95 % interval."""
    clusters: int = 0
    """Number of groups with related items, e.g. questions about one text; else the number of items."""
    higher_is_better: bool = True

    @property
    def label(self) -> str:
        return self.name if self.k is None else self.name.replace("@k", f"@{self.k}")


@dataclass(frozen=True)
class TaskScores:
    task_hash: str
    """Hash of definition and data, from `hash_task`."""
    output_type: str
    """`loglikelihood`, `loglikelihood_rolling`, `generate_until` or `multiple_choice`."""
    items: int
    metrics: tuple[Metric, ...]
    """The task's main metric first."""
    dataset: dict[str, dict[str, str]] = field(default_factory=lambda: {"files": {}})
    """`files`: data file -> SHA-256."""
    num_fewshot: int = 0
    """Examples before each item."""
    prompt_hash: str = ""
    """SHA-256 over the requests."""
    chat_template: bool = False
    """Whether prompts used the chat template."""
    mode: str = DEFAULT_MODE
    """`default`, `thinking` or `no-thinking`."""
    sampling: TaskSampling = field(default_factory=TaskSampling)
    judge: str | None = None
    """Name and version of the reward; None for lm-eval's own metrics."""
    limit: int | None = None
    failed: int = 0
    """Items without a score because a reward failed."""
    at_limit: int = 0
    """Answers cut at `max_tokens`."""
    notes: tuple[str, ...] = ()
    """Unknown metrics and warnings from lm-eval."""


@dataclass(frozen=True)
class ResultSample:
    response: str
    """Generated text before filters."""
    finish_reason: str | None = None
    """`stop` or `length`."""
    score: float | None = None
    """The first metric for this answer alone; None if only the item has a score."""


@dataclass(frozen=True)
class ResultItem:
    """A line in the items file."""

    task: str
    item: str
    """Number or name in the task's data."""
    doc_sha256: str
    cluster: str | None = None
    """Value shared by related items."""
    question: str = ""
    """Text without examples and chat template."""
    answer: str = ""
    """Reference answer; for multiple choice its text."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """`METRIC` or `METRIC,FILTER` -> value."""
    samples: tuple[ResultSample, ...] = ()
    """Generations; empty for likelihoods."""
    failed: str | None = None
    """Reason for a missing score."""


@dataclass(frozen=True)
class Results:
    model: EvaluatedModel
    tasks: dict[str, TaskScores]
    """Task or group -> scores."""
    harness: dict[str, str]
    """`lm_eval`: version."""
    items: dict[str, str] = field(default_factory=dict)
    """`file`: name of the items file; `sha256`: its hash."""
    format_version: int = FORMAT_VERSION
    kind: str = KIND


def get_items_path(output: Path) -> Path:
    """Return OUT.items.jsonl for OUT.json."""
    return output.with_name(f"{output.name.removesuffix('.json')}.items.jsonl")


def write_results(output: Path, results: Results, items: Iterable[ResultItem]) -> Results:
    """Write the items file and the result file atomically; return the results with the items' hash. Raises
    `UserError`: the folder is not writable."""
    items_path = get_items_path(output)
    lines = b"".join(format_json_line(dataclasses.asdict(item)) for item in items)
    # items first: after a kill, earlier results no longer match the hash, which `read_items` reports
    write_output(items_path, lines)
    digest = hashlib.sha256(lines).hexdigest()
    written = dataclasses.replace(results, items={"file": items_path.name, "sha256": digest})
    write_output(output, format_json(written))
    return written


def read_results(path: Path) -> Results:
    """Read a result file of `eval lm`. Raises `UserError`: an unreadable, damaged or different file."""
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict) or raw.get("kind") != KIND:
            raise UserError(f"{path}: is no result of `megatron-sov eval lm`; pass its --output")
        # check the version first: a newer version may have other fields
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(f"{path}: format_version {raw['format_version']} is newer than {FORMAT_VERSION}, "
                            "the newest supported version; update megatron-sov")
        return _parse_object(Results, raw)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); pass the --output of "
                        "`megatron-sov eval lm`") from None
    except _DAMAGE as e:
        raise _build_damage_error(f"{path}:", e) from None


def read_items(output: Path, results: Results) -> Iterator[ResultItem]:
    """Yield the items of a result file. Raises `UserError`: a missing, damaged or different items file."""
    # only the name: foreign results must not lead to another folder
    path = output.with_name(Path(results.items.get("file", "")).name or get_items_path(output).name)
    if not path.is_file():
        raise UserError(f"{path}: does not exist, and {output} names it; restore it, or run `megatron-sov "
                        "eval lm` again")
    if sha256_file(path) != results.items.get("sha256"):
        raise UserError(f"{path}: differs from the hash in {output}; restore both from one evaluation")
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE_BYTES), b""), start=1):
            try:
                yield _parse_object(ResultItem, json.loads(line))
            except _DAMAGE as e:
                raise _build_damage_error(f"{path}: line {number}", e) from None


def _parse_object(kind: type[T], raw: Any) -> T:
    parsed: T = _build_adapter(kind).validate_python(raw)  # type: ignore[arg-type]
    return parsed


@lru_cache
def _build_adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _build_damage_error(place: str, error: Exception) -> UserError:
    reason = f"{error!r:.200}"
    if errors := getattr(error, "errors", None):
        reason = f"{'.'.join(map(str, errors()[0]['loc']))}: {errors()[0]['msg']}"
    return UserError(f"{place} is damaged ({reason}); run `megatron-sov eval lm` again")


def format_score_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def format_scores(results: Results) -> str:
    rows = [("task", "metric", "value", "95 % interval", "items", "failed", "at limit")]
    for name, task in results.tasks.items():
        for metric in task.metrics:
            label = metric.label if metric.filter == "none" else f"{metric.label} ({metric.filter})"
            value = "not known" if metric.value is None else f"{metric.value:.4f}"
            interval = ""
            if metric.interval is not None:
                interval = f"{metric.interval[0]:.4f} to {metric.interval[1]:.4f}"
            rows.append((name, label, value, interval, f"{task.items:,}", f"{task.failed:,}",
                         f"{task.at_limit:,}"))
    return align_columns(rows, left=(0, 1))

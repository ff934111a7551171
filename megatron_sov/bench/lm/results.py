"""What `eval lm` found: scores of a model on tasks, with all that decides them, and the items behind them.

No torch and no lm_eval here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_sov.base.artifacts import format_json, sha256_file, write_output
from megatron_sov.base.documents.rows import format_json_line
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Finite

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT_VERSION, KIND = 1, "eval-lm"
DEFAULT = "default"
"""How a reasoning model is asked: as its chat template leaves it; others are "thinking" and "no-thinking"."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of an items file that is read."""
T = TypeVar("T")
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class EvaluatedModel:
    path: str
    hash: str
    """Of its content."""
    kind: str
    """`checkpoint` or `huggingface`."""
    step: int | None = None
    run: str | None = None
    """Folder of the run that the figures were added to."""


@dataclass(frozen=True)
class TaskSampling:
    """How answers were written; nothing of it matters where likelihoods are compared."""

    temperature: float = 0.0
    """0: the most probable token."""
    top_p: float = 1.0
    """Smallest set of tokens that holds this much probability."""
    top_k: int = 0
    """Most probable tokens that were drawn from; 0: all."""
    max_tokens: int = 256
    seed: int = 0
    samples: int = 1
    """Answers to each item."""


@dataclass(frozen=True)
class Metric:
    name: str
    """As lm-eval names it (`acc`), or `avg@k`, `pass@k`, `cons@k`."""
    value: Finite | None
    """None: there is no item that it can be computed from, or it divides by zero."""
    filter: str = "none"
    """lm-eval's filter that answers went through before they were judged."""
    k: int | None = None
    """Of `avg@k`, `pass@k`, `cons@k`."""
    stderr: float | None = None
    """Standard error over clusters; None: cannot be told."""
    interval: tuple[float, float] | None = None
    """95 percent interval."""
    clusters: int = 0
    """Groups of items that belong together, such as questions about one text; without any, the items."""
    higher_is_better: bool = True
    """Whether a greater value is a better one."""

    @property
    def label(self) -> str:
        return self.name if self.k is None else self.name.replace("@k", f"@{self.k}")


@dataclass(frozen=True)
class Contamination:
    """Whether items of a task were found in what the model was trained on."""

    checked_against: str
    """What was searched."""
    items_hit: int
    """Items that share a long piece with it."""
    value_without: float | None = None
    """The task's first metric over the other items."""


@dataclass(frozen=True)
class TaskScores:
    task_hash: str
    """Of the task's definition and its data."""
    output_type: str
    """`loglikelihood`, `loglikelihood_rolling`, `generate_until` or `multiple_choice`."""
    items: int
    metrics: tuple[Metric, ...]
    """All figures, the task's first one first."""
    dataset: dict[str, dict[str, str]] = field(default_factory=lambda: {"files": {}})
    """`files`: name of each data file -> its SHA-256."""
    num_fewshot: int = 0
    """Examples in front of each item."""
    prompt_hash: str = ""
    """SHA-256 of all requests as the model was given them."""
    chat_template: bool = False
    """Whether they were framed by the chat template."""
    mode: str = DEFAULT
    """`default`, `thinking` or `no-thinking`."""
    sampling: TaskSampling = field(default_factory=TaskSampling)
    judge: str | None = None
    """Name and version of what judged answers in place of lm-eval's metric."""
    limit: int | None = None
    failed: int = 0
    """Items that have no score, through no fault of the model."""
    at_limit: int = 0
    """Answers that did not end by themselves and were cut."""
    contamination: Contamination | None = None
    notes: tuple[str, ...] = ()
    """Figures that could not be computed, and warnings of lm-eval about the task."""


@dataclass(frozen=True)
class ResultSample:
    response: str
    """As the model wrote it, before filters."""
    finish_reason: str | None = None
    """`stop` or `length`."""
    score: float | None = None
    """Of this answer alone, by the task's first metric; None where only the item as a whole has one."""


@dataclass(frozen=True)
class ResultItem:
    """One item of a task; a line of the items file."""

    task: str
    item: str
    """Number or name of the item in its task's data."""
    doc_sha256: str
    cluster: str | None = None
    """What items that belong together have in common."""
    question: str = ""
    """What is asked, without examples in front and without the chat template."""
    answer: str = ""
    """The right answer; of several choices its text."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """`METRIC`, or `METRIC,FILTER` behind one of lm-eval's filters -> value of this item alone."""
    samples: tuple[ResultSample, ...] = ()
    """Answers; none where likelihoods are compared."""
    failed: str | None = None
    """Why it has no score."""


@dataclass(frozen=True)
class Results:
    model: EvaluatedModel
    tasks: dict[str, TaskScores]
    """Name of each task -> what was found."""
    harness: dict[str, str]
    """`lm_eval`: version of the library."""
    items: dict[str, str] = field(default_factory=dict)
    """`file`: name of the items file, beside the results; `sha256`: its hash."""
    format_version: int = FORMAT_VERSION
    kind: str = KIND


def items_file(output: Path) -> Path:
    """Return where the items of OUT.json lie: OUT.items.jsonl beside it."""
    return output.with_name(f"{output.name.removesuffix('.json')}.items.jsonl")


def write_results(output: Path, results: Results, items: Iterable[ResultItem]) -> Results:
    """Write the items, then the results, which appear whole and name the items' hash; returns them with it.

    Raises:
        UserError: nothing can be written there.
    """
    beside = items_file(output)
    lines = b"".join(format_json_line(dataclasses.asdict(item)) for item in items)
    # items first: a kill behind this leaves earlier results whose hash no longer fits, and says so
    write_output(beside, lines)
    digest = hashlib.sha256(lines).hexdigest()
    whole = dataclasses.replace(results, items={"file": beside.name, "sha256": digest})
    write_output(output, format_json(whole))
    return whole


def read_results(path: Path) -> Results:
    """Return what a file of `eval lm` holds.

    Raises:
        UserError: it cannot be read, is of another kind or damaged.
    """
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict) or raw.get("kind") != KIND:
            raise UserError(f"{path}: is no result of `megatron-sov eval lm`; pass its --output")
        # before the fields are read, which a newer version may have others of
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(f"{path}: format_version {raw['format_version']} is newer than {FORMAT_VERSION}, "
                            "the newest that this version reads; update megatron-sov")
        return _read(Results, raw)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); pass the --output of "
                        "`megatron-sov eval lm`") from None
    except _DAMAGE as e:
        raise _damaged(f"{path}:", e) from None


def read_items(output: Path, results: Results) -> Iterator[ResultItem]:
    """Yield the items behind results.

    Raises:
        UserError: they are not there, or not those that the results were computed from.
    """
    # the name alone: a stranger's results must not lead to a file of another folder
    path = output.with_name(Path(results.items.get("file", "")).name or items_file(output).name)
    if not path.is_file():
        raise UserError(f"{path}: does not exist, and {output} names it; restore it, or run `megatron-sov "
                        "eval lm` again")
    if sha256_file(path) != results.items.get("sha256"):
        raise UserError(f"{path}: differs from the hash in {output}; restore both from one evaluation")
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE_BYTES), b""), start=1):
            try:
                yield _read(ResultItem, json.loads(line))
            except _DAMAGE as e:
                raise _damaged(f"{path}: line {number}", e) from None


def _read(kind: type[T], raw: Any) -> T:
    found: T = _adapter(kind).validate_python(raw, extra="forbid")  # type: ignore[arg-type]
    return found


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _damaged(place: str, error: Exception) -> UserError:
    said = f"{error!r:.200}"
    if errors := getattr(error, "errors", None):
        said = f"{'.'.join(map(str, errors()[0]['loc']))}: {errors()[0]['msg']}"
    return UserError(f"{place} is damaged ({said}); run `megatron-sov eval lm` again")


def score_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def table(results: Results) -> str:
    """Return the scores as text; what could not be computed says so."""
    rows = [("task", "metric", "value", "95 % interval", "items", "failed", "at limit")]
    for name, task in results.tasks.items():
        for metric in task.metrics:
            said = metric.label if metric.filter == "none" else f"{metric.label} ({metric.filter})"
            interval = ("" if metric.interval is None
                        else f"{metric.interval[0]:.4f} to {metric.interval[1]:.4f}")
            rows.append((name, said, "not known" if metric.value is None else f"{metric.value:.4f}", interval,
                         f"{task.items:,}", f"{task.failed:,}", f"{task.at_limit:,}"))
    return aligned(rows, left=(0, 1))


def aligned(rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if column in left else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)

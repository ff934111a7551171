"""From answers to figures: what divides by zero, has no items or fails is named, never 0."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_sov.base.artifacts import MANIFEST, new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm import scoring, subject as lm_subject
from megatron_sov.bench.lm.answers import Answers, AnswerScore
from megatron_sov.bench.lm.results import (
    Contamination, EvaluatedModel, Metric, ResultItem, Results, ResultSample, TaskScores, items_file,
    read_items, read_results, table, write_results)
from megatron_sov.bench.lm.subject import NotAnswered, content_hash


class Instance:
    """As lm-eval's."""

    request_type, repeats, idx = "loglikelihood", 1, 0

    def __init__(self, number: int, doc: dict[str, Any]) -> None:
        self.doc_id, self.doc = number, doc
        self.resps: list[Any] = []
        self.filtered_resps: dict[str, Any] = {}


class Task:
    """A task whose items score what their data say; `aggregate` makes the figure."""

    OUTPUT_TYPE, task_name = "loglikelihood", "scripted"

    def __init__(self, values: Sequence[Any], aggregate: Callable[[Any], Any]) -> None:
        self.instances = self._instances = [Instance(i, {"value": v, "page": i // 2})
                                            for i, v in enumerate(values)]
        self._aggregate = aggregate

    def apply_filters(self) -> None:
        for instance in self._instances:
            instance.filtered_resps = {"none": instance.resps[0]}

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        if doc["value"] == "bad":
            raise ValueError("no number in the answer")
        return {"score": doc["value"]}

    def aggregation(self) -> dict[str, Any]:
        return {"score": self._aggregate}

    def higher_is_better(self) -> dict[str, bool]:
        return {"score": True}

    def get_config(self, name: str) -> Any:
        return None

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return "?"

    doc_to_target = doc_to_text


class Bridge:
    """Answers all but items whose data say so."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        if requests[0].doc["value"] == "unanswered":
            raise NotAnswered("the endpoint answered HTTP 500")
        return [(0.0, True) for _ in requests]


def score(values: Sequence[Any], aggregate: Callable[[Any], Any], cluster_field: str | None = None
          ) -> scoring.ScoredTask:
    return scoring.score_task(Task(values, aggregate), Bridge(), cluster_field)  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("values", "aggregate", "why"), [
    ([1, 2], lambda values: 1 / 0, "it divides by zero"),
    ([1, 2], lambda values: math.exp(1e9), "it is too large for a number"),
    ([1, 2], lambda values: math.nan, "it is nan, which is no number"),
    ([1, 2], lambda values: values.lost, "its metric fails (AttributeError"),
    (["unanswered", "bad"], mean, "there is no item with a score"),
])
def test_a_figure_that_cannot_be_computed_is_none_and_says_why(values: Any, aggregate: Any, why: str) -> None:
    found = score(values, aggregate)
    assert [(m.name, m.value, m.interval) for m in found.metrics] == [("score", None, None)]
    assert why in found.notes[0]


def test_items_without_a_score_are_left_out_and_named() -> None:
    found = score([1.0, "unanswered", 0.0, "bad", 1.0], mean)
    assert found.metrics[0].value == 2 / 3
    assert [item.failed for item in found.items] == [
        None, "the endpoint answered HTTP 500", None,
        "its metric fails (ValueError: no number in the answer)", None]
    assert [item.scores for item in found.items] == [{"score": 1.0}, {}, {"score": 0.0}, {}, {"score": 1.0}]


def test_items_of_a_cluster_count_together() -> None:
    alone, together = score([3.0, 3.0, 0.0, 0.0], mean), score([3.0, 3.0, 0.0, 0.0], mean, "page")
    assert [alone.metrics[0].clusters, together.metrics[0].clusters] == [4, 2]
    assert together.metrics[0].stderr == pytest.approx(1.5)  # two means, 3 and 0
    assert alone.metrics[0].stderr == pytest.approx(stats.sem([3, 3, 0, 0]))
    assert [item.cluster for item in together.items] == ["0", "0", "1", "1"]


def test_what_is_no_mean_has_the_error_of_a_jackknife() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(2.0, 0.3, 40).tolist()

    def perplexity(found: Sequence[float]) -> float:
        return math.exp(mean(found))

    figure = score(values, perplexity).metrics[0]
    # by the delta method
    assert figure.stderr == pytest.approx(perplexity(values) * stats.sem(values), rel=0.02)
    low, high = np.exp(stats.t.interval(0.95, 39, np.mean(values), stats.sem(values)))
    assert figure.interval == pytest.approx((low, high), rel=1e-3)


@pytest.mark.parametrize("size", [1e154, 1e200, 1e307, 1.7e308])
@pytest.mark.parametrize("aggregate", [mean, max, lambda found: math.exp(math.log(min(found)))])
def test_figures_near_the_largest_number_are_figures(size: float, aggregate: Callable[..., Any]) -> None:
    notes: list[str] = []
    values = [size, size * 0.5, size * 0.25]
    found = scoring._metric("ppl", "none", values, [None] * 3, aggregate, False, notes)
    assert found.value == pytest.approx(aggregate(values)) or "is not known" in notes[0]
    assert found.interval is None or all(map(math.isfinite, found.interval))
    if size == 1e154:
        assert found.interval is not None


def test_a_likelihood_that_is_nan_is_no_score() -> None:
    asked, other = AnswerScore((1,), (2,)), AnswerScore((1,), (3,))
    answers: Any = {asked.key: {"logprob": math.nan, "greedy": False},
                    other.key: {"logprob": -math.inf, "greedy": False}}
    model = lm_subject.Bridge(lm_subject.SubjectReading(None, 8), answers)
    with pytest.raises(NotAnswered, match="NaN"):
        model.answer(asked)
    assert model.answer(other)["logprob"] == -math.inf


def test_a_group_is_better_in_the_direction_of_its_members() -> None:
    class Group:
        def aggregate(self, found: dict[str, Any]) -> dict[str, Any]:
            return {name: sum(task[name] for task in found.values()) / len(found)
                    for name in ("perplexity,none", "acc,none")}

    of_task = (Metric("perplexity", 4.0, higher_is_better=False), Metric("acc", 0.5))
    told = scoring.group_metrics(Group(), {"a": of_task, "b": of_task}, {"a": 1, "b": 1})
    assert [(m.name, m.value, m.higher_is_better) for m in told] == [("perplexity", 4.0, False),
                                                                     ("acc", 0.5, True)]


@pytest.mark.parametrize("given", [
    {"temperature": None}, {"max_gen_toks": "many"}, {"max_gen_toks": 0},
    {"do_sample": True, "temperature": -1}])
def test_generation_settings_that_are_no_numbers_are_told(given: dict[str, Any], tmp_path: Path) -> None:
    instance: Any = Instance(0, {})
    instance.request_type, instance.task_name, instance.args = "generate_until", "t", ("?", given)
    with pytest.raises(UserError, match=r"task t: generation_kwargs .* cannot be used"):
        lm_subject.Bridge(lm_subject.SubjectReading(None, 64), Answers(tmp_path)).requests_of(instance)


FOUND = Results(EvaluatedModel("model", "abc", "huggingface"), {"t": TaskScores(
    "h", "generate_until", 2,
    (Metric("pass@k", 0.1 + 0.2, k=8, stderr=0.1, interval=(0.1, 0.5), clusters=2),
     Metric("f1", None, "strict")),
    failed=1, at_limit=1, contamination=Contamination("shards", 1, None))}, {"lm_eval": "0.4.13"})
ITEMS = [ResultItem("t", "0", "d", "page", "Q", "A", {"pass@8": 1 / 3},
                    (ResultSample("한국어\ud800", "length", 0.5),)),
         ResultItem("t", "1", "e", failed="no answer")]


def test_results_and_items_are_read_back_to_the_bit(tmp_path: Path) -> None:
    written = write_results(tmp_path / "out.json", FOUND, ITEMS)
    assert read_results(tmp_path / "out.json") == written
    assert list(read_items(tmp_path / "out.json", written)) == ITEMS
    assert items_file(tmp_path / "out.json").name == written.items["file"] == "out.items.jsonl"


def test_the_table_says_what_is_not_known() -> None:
    assert [line.split() for line in table(FOUND).splitlines()[1:]] == [
        ["t", "pass@8", "0.3000", "0.1000", "to", "0.5000", "2", "1", "1"],
        ["t", "f1", "(strict)", "not", "known", "2", "1", "1"]]


@pytest.mark.parametrize(("text", "said"), [
    ("", "is damaged"), ("[1]", "is no result of"), ('{"kind": "other"}', "is no result of"),
    ('{"kind": "eval-lm", "format_version": 2}', "update megatron-sov"),
    ('{"kind": "eval-lm", "format_version": 1}', "is damaged (model: Field required"),
    ("[" * 100_000, "is damaged (RecursionError"),
])
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError) as told:
        read_results(tmp_path / "out.json")
    assert said in str(told.value)


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "out.json", FOUND, ITEMS)
    text = (tmp_path / "out.json").read_text().replace(str(0.1 + 0.2), "NaN")
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError, match=r"tasks.t.metrics.0.value: Input should be"):
        read_results(tmp_path / "out.json")


def test_a_figure_that_is_too_large_for_a_number_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "out.json", FOUND, ITEMS)
    text = (tmp_path / "out.json").read_text().replace(str(0.1 + 0.2), "1" + "0" * 400)
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_results(tmp_path / "out.json")


def test_items_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    written = write_results(tmp_path / "out.json", FOUND, ITEMS)
    file = tmp_path / "out.items.jsonl"
    file.write_text(json.dumps({"task": "t"}) + "\n")
    with pytest.raises(UserError, match="differs from the hash"):
        next(read_items(tmp_path / "out.json", written))
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        next(read_items(tmp_path / "out.json", written))


WEIGHTS = "model.safetensors"


def test_weights_that_were_saved_over_an_artifact_are_found(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "hf", "hf_model") as artifact:
        (artifact.path / "config.json").write_bytes(b"{}")
        (artifact.path / WEIGHTS).write_bytes(b"12345678")
    target: Any = SimpleNamespace(path=tmp_path / "hf")
    whole = content_hash(target)
    file = tmp_path / "hf" / WEIGHTS
    written_s = (tmp_path / "hf" / MANIFEST).stat().st_mtime
    os.utime(file, (written_s + 9, written_s + 9))  # a copy may be younger
    assert content_hash(target) == whole
    file.write_bytes(b"87654321")
    os.utime(file, (written_s + 9, written_s + 9))
    with pytest.raises(UserError, match=WEIGHTS):
        content_hash(target)
    file.write_bytes(b"1234")
    os.utime(file, (written_s - 9, written_s - 9))
    with pytest.raises(UserError, match=WEIGHTS):
        content_hash(target)

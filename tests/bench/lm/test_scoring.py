"""Scores from answers: a metric that fails or divides by zero is reported by name, never as 0."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy import stats

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm import scoring
from megatron_sov.bench.lm.answers import LikelihoodRequest
from megatron_sov.bench.lm.evaluated_lm import EvaluatedLM
from megatron_sov.bench.lm.results import (
    EvaluatedModel, Metric, ResultItem, Results, ResultSample, TaskScores, format_scores, get_items_path,
    read_items, read_results, write_results)
from megatron_sov.bench.lm.settings import LmEvalSettings, TaskSources
from megatron_sov.bench.lm.tasks import load_tasks


class Scripted(EvaluatedLM):
    """Answers each prompt with itself."""

    def __init__(self) -> None:
        tokens = SimpleNamespace(encode=lambda text, **_: list(map(ord, text)), bos_token=None)
        super().__init__(tokens, 1000, {})

    def _get_answer(self, request: Any) -> Any:
        return {"text": "".join(map(chr, request.prompt)), "finish_reason": "stop"}


def score(folder: Path, values: Sequence[Any], aggregate: Callable[[Any], Any],
          cluster_field: str = "") -> tuple[TaskScores, list[ResultItem], list[str]]:
    """Score items whose answers equal their questions; `aggregate`
    computes the figure from the item values."""
    rows = [{"q": str(v), "page": i // 2} for i, v in enumerate(values)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: q\nmetric_list:\n"
        "- {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
        f"metadata: {{version: 1, sov: {{cluster_field: '{cluster_field}'}}}}\n")
    task = load_tasks(["t"], TaskSources((folder,))).tasks["t"]
    task.process_results = lambda doc, results: {"exact_match": float(results[0])}
    task._aggregation_list["exact_match"] = aggregate
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    built = scoring.BuiltTask("t", task, None, {"d": "h"}, 0)
    scores, items, notes = scoring.score_tasks([built], {}, Scripted(),
                                               LmEvalSettings(output=folder / "out.json"))
    return scores["t"], items, notes


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("aggregate", [
    lambda values: 1 / 0, lambda values: math.exp(1e9), lambda values: math.nan])
def test_an_undefined_metric_is_none_with_a_reason(aggregate: Any, tmp_path: Path) -> None:
    found, _, notes = score(tmp_path, [1, 2], aggregate)
    assert [(m.name, m.value, m.interval) for m in found.metrics] == [("exact_match", None, None)]
    assert notes == ["t: exact_match is not known: it has no item with a score, divides by zero or is too "
                     "large for a number"]


@pytest.mark.parametrize(("values", "aggregate", "message"), [
    (["bad"], mean, "could not convert string to float"),
    ([1], lambda values: values.lost, "AttributeError")])
def test_a_metric_that_fails_is_named(values: Any, aggregate: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"tasks t: lm-eval cannot score the answers \(.*{message}"):
        score(tmp_path, values, aggregate)


def test_standard_error_is_computed_over_cluster_means(tmp_path: Path) -> None:
    alone, _, _ = score(tmp_path, [3.0, 3.0, 0.0, 0.0], mean)
    together, items, _ = score(tmp_path, [3.0, 3.0, 0.0, 0.0], mean, "page")
    assert [alone.metrics[0].clusters, together.metrics[0].clusters] == [4, 2]
    assert together.metrics[0].stderr == pytest.approx(1.5)  # two means, 3 and 0
    assert alone.metrics[0].stderr == pytest.approx(stats.sem([3, 3, 0, 0]))
    assert [item.cluster for item in items] == ["0", "0", "1", "1"]


def test_a_metric_other_than_an_item_mean_has_no_interval(tmp_path: Path) -> None:
    found, _, _ = score(tmp_path, [1.0, 2.0], lambda values: math.exp(mean(values)))
    assert found.metrics[0].value == pytest.approx(math.exp(1.5))
    assert found.metrics[0].interval is None


def test_a_likelihood_that_is_nan_is_refused() -> None:
    broken, impossible = LikelihoodRequest((1,), (2,)), LikelihoodRequest((1,), (3,))
    answers: Any = {broken.key: {"logprob": math.nan, "greedy": False},
                    impossible.key: {"logprob": -math.inf, "greedy": False}}
    model = EvaluatedLM(None, 8, answers)
    with pytest.raises(UserError, match="a likelihood is NaN"):
        model._loglikelihood_tokens([(None, [1], [2])])
    assert model._loglikelihood_tokens([(None, [1], [3])]) == [(-math.inf, False)]


@pytest.mark.parametrize("given", [
    {"temperature": None}, {"max_gen_toks": "many"}, {"max_gen_toks": 0},
    {"do_sample": True, "temperature": -1}])
def test_non_numeric_generation_settings_are_refused(given: dict[str, Any]) -> None:
    instance: Any = SimpleNamespace(request_type="generate_until", task_name="t", args=("?", given),
                                    repeats=1)
    with pytest.raises(UserError, match=r"task t: generation_kwargs .* cannot be used"):
        EvaluatedLM(None, 64, {}).collect_requests([instance])


FOUND = Results(EvaluatedModel("model", "abc", "huggingface"), {"t": TaskScores(
    "h", "generate_until", 2,
    (Metric("pass@k", 0.1 + 0.2, k=8, stderr=0.1, interval=(0.1, 0.5), clusters=2),
     Metric("f1", None, "strict")),
    failed=1, at_limit=1)}, {"lm_eval": "0.4.13"})
ITEMS = [ResultItem("t", "0", "d", "page", "Q", "A", {"pass@8": 1 / 3},
                    (ResultSample("한국어\ud800", "length", 0.5),)),
         ResultItem("t", "1", "e", failed="no answer")]


def test_results_and_items_are_read_back_to_the_bit(tmp_path: Path) -> None:
    written = write_results(tmp_path / "out.json", FOUND, ITEMS)
    assert read_results(tmp_path / "out.json") == written
    assert list(read_items(tmp_path / "out.json", written)) == ITEMS
    assert get_items_path(tmp_path / "out.json").name == written.items["file"] == "out.items.jsonl"


def test_table_names_unknown_values() -> None:
    assert [line.split() for line in format_scores(FOUND).splitlines()[1:]] == [
        ["t", "pass@8", "0.3000", "0.1000", "to", "0.5000", "2", "1", "1"],
        ["t", "f1", "(strict)", "not", "known", "2", "1", "1"]]


@pytest.mark.parametrize(("text", "message"), [
    ("", "is damaged"), ("[1]", "is no result of"), ('{"kind": "other"}', "is no result of"),
    ('{"kind": "eval-lm", "format_version": 2}', "update megatron-sov"),
    ('{"kind": "eval-lm", "format_version": 1}', "is damaged (model: Field required"),
    ("[" * 100_000, "is damaged (RecursionError"),
])
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_results(tmp_path / "out.json")
    assert message in str(error.value)


@pytest.mark.parametrize("number", ["NaN", "1" + "0" * 400])
def test_a_non_numeric_figure_is_refused(tmp_path: Path, number: str) -> None:
    write_results(tmp_path / "out.json", FOUND, ITEMS)
    text = (tmp_path / "out.json").read_text().replace(str(0.1 + 0.2), number)
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

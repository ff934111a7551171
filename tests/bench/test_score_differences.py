"""Compare two results item by item, and refuse results that were measured differently."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.results import TaskSampling
from megatron_sov.bench.score_differences import compute_differences, format_differences, read_scored_results
from megatron_sov.cli import main
from megatron_sov.eval.statistics import estimate_difference

Written = Callable[..., Path]


def test_pairs_are_items_of_one_name_and_clusters_are_theirs(written_scores: Written, tmp_path: Path) -> None:
    before, after = [1, 0, 0, 1, 0, None], [1, 1, 0, 1, 1, 1]
    clusters = ["x", "x", "y", "y", "z", "z"]
    first = written_scores(tmp_path / "a.json", before, clusters=clusters)
    second = written_scores(tmp_path / "b.json", after, clusters=clusters)
    found, = compute_differences(read_scored_results(first), read_scored_results(second))
    expected = estimate_difference([1, 0, 0, 1, 0], [1, 1, 0, 1, 1], clusters[:5])
    assert (found.before, found.after, found.value) == (0.4, 0.8, pytest.approx(0.4))
    assert (found.interval, found.standard_error) == (expected.interval, expected.standard_error)
    assert (found.items, found.clusters, found.left_out, found.verdict) == (5, 3, 1, "not told apart")


def test_a_loss_that_falls_is_a_better_one(written_scores: Written, tmp_path: Path) -> None:
    first = written_scores(tmp_path / "a.json", [3.0 + i / 10 for i in range(20)], metric="loss")
    second = written_scores(tmp_path / "b.json", [2.5 + i / 9 for i in range(20)], metric="loss")
    found, = compute_differences(read_scored_results(first), read_scored_results(second))
    assert found.value < 0 and found.verdict == "better"
    assert compute_differences(read_scored_results(second), read_scored_results(first))[0].verdict == "worse"


def test_a_corpus_metric_has_no_interval_from_items(written_scores: Written, tmp_path: Path) -> None:
    first = written_scores(tmp_path / "a.json", [2.0, 3.0], metric="loss", value=14.1)
    second = written_scores(tmp_path / "b.json", [2.5, 3.5], metric="loss", value=20.0)
    found, = compute_differences(read_scored_results(first), read_scored_results(second))
    assert (found.before, found.after, found.value) == (14.1, 20.0, pytest.approx(5.9))
    assert found.interval is None and found.verdict == "not known"
    assert "is no mean of its items" in format_differences([found])


@pytest.mark.parametrize(("changed", "message"), [
    ({"task_hash": "u" * 64}, "task quiz: task_hash"), ({"num_fewshot": 3}, "num_fewshot 0 is not 3"),
    ({"prompt_hash": "q"}, "the prompts differ"), ({"mode": "thinking"}, "mode"),
    ({"limit": 2}, "limit None is not 2"), ({"judge": "j"}, "judge None is not 'j'"),
])
def test_results_measured_differently_are_refused_by_name(written_scores: Written, tmp_path: Path,
                                                          changed: dict[str, Any], message: str) -> None:
    first = written_scores(tmp_path / "a.json", [1.0, 0.0])
    second = written_scores(tmp_path / "b.json", [1.0, 0.0], **changed)
    with pytest.raises(UserError, match=message):
        compute_differences(read_scored_results(first), read_scored_results(second))


def test_sampling_must_agree_where_answers_are_written_and_seeds_may_differ(written_scores: Written,
                                                                            tmp_path: Path) -> None:
    def of(name: str, **sampling: Any) -> Path:
        return written_scores(tmp_path / name, [1.0, 0.0], output_type="generate_until",
                              sampling=TaskSampling(**sampling))

    first = read_scored_results(of("a.json", temperature=0.6, seed=1))
    compute_differences(first, read_scored_results(of("b.json", temperature=0.6, seed=2)))
    with pytest.raises(UserError, match=r"sampling.temperature 0.6 is not 1.0"):
        compute_differences(first, read_scored_results(of("c.json", temperature=1.0)))


def test_other_items_under_the_same_names_are_refused(written_scores: Written, tmp_path: Path) -> None:
    first, second = (written_scores(tmp_path / f"{name}.json", [1.0, 0.0]) for name in "ab")
    scored = read_scored_results(second)
    other = {"quiz": {name: dataclasses.replace(item, doc_sha256="else")
                      for name, item in scored.items["quiz"].items()}}
    with pytest.raises(UserError, match="2 items have the same name and another content"):
        compute_differences(read_scored_results(first), dataclasses.replace(scored, items=other))


def test_the_command_prints_a_table_or_json_and_refuses_in_a_sentence(
        written_scores: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_output: Any,
        get_refusal: Any) -> None:
    first, second = (str(written_scores(tmp_path / f"{n}.json", scores, model=n)) for n, scores in
                     (("a", [0.0] * 30 + [1.0] * 10), ("b", [1.0] * 40)))
    line = read_output("eval", "difference", first, second).splitlines()[1].split()
    assert line[:5] == ["quiz", "acc", "0.2500", "1.0000", "+0.7500"] and line[-1] == "better"
    out = tmp_path / "difference.json"
    assert main(["eval", "difference", first, second, "--json", "--output", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert json.loads(out.read_text())["differences"][0]["verdict"] == "better"
    for argv, sentence in [
            ([first, str(tmp_path / "no.json")], "no.json: cannot be read"),
            ([first, second, "--tasks", "other"], "has no task other"),
            ([first, second, "--output", first], "is read"),
            ([first, second, "--tasks", ","], "names no task"),
            ([first], "required: B.json")]:
        assert sentence in get_refusal("eval", "difference", *argv)
    (tmp_path / "b.items.jsonl").write_text("{}\n")
    assert "differs from the hash" in get_refusal("eval", "difference", first, second)


@pytest.mark.parametrize(("changed", "message"), [
    ({"scores": {"acc": "x"}}, "scores.acc"), ({"scores": [1]}, "scores"), ({"item": 3}, "item"),
    ({"cluster": {"a": 1}}, "cluster"), ({"question": None}, "question")])
def test_foreign_items_with_other_value_types_are_refused(written_scores: Written, tmp_path: Path,
                                                          changed: dict[str, Any], message: str) -> None:
    path = written_scores(tmp_path / "a.json", [1.0, 0.0])
    lines = (tmp_path / "a.items.jsonl").read_text().splitlines()
    text = "\n".join([lines[0], json.dumps(json.loads(lines[1]) | changed)]) + "\n"
    (tmp_path / "a.items.jsonl").write_text(text)
    raw = json.loads(path.read_text())
    raw["items"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"is damaged.*{message}"):
        read_scored_results(path)

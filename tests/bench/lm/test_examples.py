"""No prompt holds the item that it asks for among its examples, in whatever split a task draws them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.examples import exclude_item_from_examples
from megatron_sov.bench.lm.tasks import TaskSources, load_tasks

TASK = ("task: t\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: 'Q: {{q}} A:'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: exact_match, aggregation: mean, "
        "higher_is_better: true}]\n")
ONE_SPLIT = "dataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
TWO_SPLITS = "dataset_kwargs: {data_files: {test: d.jsonl, train: train.jsonl}}\ntest_split: test\n"
CASES = {
    "a test split alone": ONE_SPLIT,
    "named as fewshot_split": ONE_SPLIT + "fewshot_split: test\n",
    "a validation split alone": ONE_SPLIT.replace("test_split", "validation_split"),
    "validation named as fewshot_split": (ONE_SPLIT.replace("test_split", "validation_split")
                                          + "fewshot_split: test\n"),
    "the first ones": ONE_SPLIT + "fewshot_config: {sampler: first_n}\n",
    "training rows that hold the items": TWO_SPLITS + "training_split: train\n",
    "another split that holds the items": TWO_SPLITS + "fewshot_split: train\n",
    "the first of another split": TWO_SPLITS + "fewshot_split: train\nfewshot_config: {sampler: first_n}\n",
    "examples in the task file": ONE_SPLIT + ("fewshot_config: {samples: [" + ", ".join(
        f"{{q: question {i}, a: answer {i}}}" for i in range(6)) + "]}\n"),
}


def build_prompts(folder: Path, text: str, num_fewshot: int, *, as_lm_eval: bool = False
                  ) -> list[tuple[Any, str]]:
    (folder / "t.yaml").write_text(TASK + text)
    items = [{"id": i, "q": f"question {i}", "a": f"answer {i}"} for i in range(6)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    # the same questions under other ids, and three more
    train = [{**row, "id": row["id"] + 100} for row in items] + [
        {"id": i, "q": f"question {i}", "a": f"answer {i}"} for i in (6, 7, 8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    task = load_tasks(["t"], TaskSources((folder,))).tasks["t"]
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(1234)
    if not as_lm_eval:
        exclude_item_from_examples("t", task)
    random.seed(0)
    task.build_all_requests()
    return [(instance.doc, instance.args[0]) for instance in task.instances]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_fewshot", [1, 3, 5])
def test_no_prompt_holds_its_own_answer(tmp_path: Path, case: str, num_fewshot: int) -> None:
    prompts = build_prompts(tmp_path, CASES[case], num_fewshot)
    assert len(prompts) == 6
    for doc, prompt in prompts:
        assert f"answer {doc['id']}" not in prompt
        assert prompt.count("Q: ") == num_fewshot + 1
        examples = prompt.split("\n\n")[:-1]
        assert len(set(examples)) == num_fewshot


def test_draws_without_the_item_are_those_of_lm_eval(tmp_path: Path) -> None:
    named = CASES["named as fewshot_split"]  # lm-eval removes the item where the task says so
    assert build_prompts(tmp_path, named, 3) == build_prompts(tmp_path, named, 3, as_lm_eval=True)
    alone = build_prompts(tmp_path, CASES["a test split alone"], 3)
    assert [prompt for _, prompt in alone] == [prompt for _, prompt in build_prompts(tmp_path, named, 3)]


@pytest.mark.parametrize(("case", "asked", "available"), [
    ("a test split alone", 6, 5), ("named as fewshot_split", 6, 5), ("the first ones", 6, 5),
    ("training rows that hold the items", 9, 8)])
def test_too_few_other_items_are_named(tmp_path: Path, case: str, asked: int, available: int) -> None:
    with pytest.raises(UserError, match=rf"{asked} examples are wanted .* hold {available} that are not the"):
        build_prompts(tmp_path, CASES[case], asked)


def test_warnings_of_lm_eval_are_kept_with_the_task(tmp_path: Path) -> None:
    text = TASK.replace(", higher_is_better: true", "") + ONE_SPLIT + "num_fewshot: 2\n"
    (tmp_path / "t.yaml").write_text(text)
    rows = [{"q": str(i), "a": str(i)} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings = load_tasks(["t"], TaskSources((tmp_path,))).warnings["t"]
    assert any("higher_is_better is not" in text for text in warnings)
    assert any("fewshot_split is None" in text for text in warnings)
    assert not any("Custom kwargs" in text for text in warnings)

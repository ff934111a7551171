"""Suites that lm-eval also has: prompts and scores equal lm-eval's, item by item."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.registry import get_filter
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import _load_module_with_cache, load_yaml
from lm_eval.utils import apply_template
from suite_items import CASES, PROX_ANSWERS, write

from megatron_sov.bench.lm.task_files import SUITES, TaskFolder, find_tasks
from megatron_sov.bench.suites.judging import AnswerJudge, parse_judging

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
Loaded = Callable[[str], Any]


def load_lm_eval_task(file: str, splits: dict[str, Sequence[dict[str, Any]]]) -> Any:
    """Return lm-eval's task of a YAML file, with our rows as its data set (split -> rows)."""
    from datasets import Dataset, DatasetDict

    config = load_yaml(LM_EVAL_TASKS / file)
    config["custom_dataset"] = lambda **_: DatasetDict(
        {split: Dataset.from_list(list(rows)) for split, rows in splits.items()})
    return ConfigurableTask(config=config)


def build_contexts(task: Any, num_fewshot: int) -> list[str]:
    """Return the prompts of all documents of a task."""
    return [task.fewshot_context(doc, num_fewshot) for doc in task.task_docs]


TASKS = find_tasks([TaskFolder(SUITES, trusted=True)]).definitions


def score_answers(name: str, doc: Any, answers: Sequence[str], metric: str) -> list[float]:
    """Return our scores of answers to one question; `name` is the suite."""
    judging = parse_judging(TASKS[name].config, allow_code=True)
    assert judging is not None
    judge = AnswerJudge(replace(judging, samples=1, k=(), metrics=("avg",)), 1)
    judged = judge.judge_answers([[answer] for answer in answers], [doc] * len(answers))
    return [judge.count_metrics(doc, [verdict])[metric] for verdict in judged]


def test_mmlu_asks_with_five_shots_of_the_subject(tmp_path: Path, loaded: Loaded) -> None:
    case = CASES["mmlu"]
    write(case, tmp_path)
    expected = []
    for subject in ("abstract_algebra", "anatomy"):  # in the order of the test file
        rows = {split: [row for row in case.files[f"mmlu/{split}.jsonl"] if row["subject"] == subject]
                for split in ("dev", "test")}
        expected += build_contexts(load_lm_eval_task(f"mmlu/default/mmlu_{subject}.yaml", rows), 5)
    task = loaded("mmlu")
    assert build_contexts(task, 5) == expected
    assert build_contexts(task, 0) != expected
    assert "about abstract algebra.\n\nWhich of these is number 0" in expected[0]


def test_mmlu_pro_asks_with_the_reasoning_of_its_category(tmp_path: Path, loaded: Loaded) -> None:
    case = CASES["mmlu-pro"]
    write(case, tmp_path)
    splits = {split: case.files[f"mmlu-pro/{split}.jsonl"] for split in ("validation", "test")}
    expected = []
    for category in ("biology", "law"):
        expected += build_contexts(load_mmlu_pro_category(category, splits), 5)
    assert build_contexts(loaded("mmlu-pro"), 5) == expected
    assert "It is number 4. The answer is (B).\n\nQuestion:" in expected[-1]


def load_mmlu_pro_category(name: str, splits: dict[str, Any]) -> Any:
    # lm-eval selects a category's test rows, but not its examples
    of_category = {split: [row for row in rows if row["category"] == name] for split, rows in splits.items()}
    return load_lm_eval_task(f"mmlu_pro/mmlu_pro_{name}.yaml", of_category)


def test_mmlu_pro_reads_answers_alike(tmp_path: Path, loaded: Loaded) -> None:
    write(CASES["mmlu-pro"], tmp_path)
    doc = loaded("mmlu-pro").task_docs[0]
    task = load_mmlu_pro_category("biology", {split: CASES["mmlu-pro"].files[f"mmlu-pro/{split}.jsonl"]
                                              for split in ("validation", "test")})
    answers = ["So the answer is (B).", "the answer is B", "The answer is (C).", "B", "Answer: B", "",
               "the answer is **B**", "the answer is (b)", "answer is (Bach)"]
    pattern = task.config.filter_list[0]["filter"][0]["regex_pattern"]
    extracted = get_filter("regex")(regex_pattern=pattern).apply([[a] for a in answers], [doc] * len(answers))
    expected = [task.process_results(doc, answer)["exact_match"] for answer in extracted]
    assert score_answers("mmlu-pro", doc, answers, "avg@1") == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize("language", ["ko", "th", "ja", "de", "es"])
def test_mmlu_prox_prompts_and_answers_equal_lm_eval(tmp_path: Path, loaded: Loaded, language: str) -> None:
    name, case = f"mmlu-prox-{language}", CASES[f"mmlu-prox-{language}"]
    write(case, tmp_path)
    expected = []
    for category in ("computer science", "law"):
        rows = {split: [row for row in case.files[f"{name}/{split}.jsonl"] if row["category"] == category]
                for split in ("validation", "test")}
        file = f"mmlu_prox/{language}/mmlu_prox_{language}_{category.replace(' ', '_')}.yaml"
        task = load_lm_eval_task(file, rows)
        expected += build_contexts(task, 5)
    our_task = loaded(name)
    assert build_contexts(our_task, 5) == expected
    assert our_task.config.generation_kwargs["until"] == task.config.generation_kwargs["until"]
    form = PROX_ANSWERS[language]
    without_brackets = form.replace("({})", "{}")
    answers = [form.format("B"), form.format("C"), without_brackets.format("B"), "B", "(B)", ""]
    pattern = task.config.filter_list[0]["filter"][0]["regex_pattern"]
    doc = task.task_docs[0]
    extracted = get_filter("regex")(regex_pattern=pattern).apply([[a] for a in answers], [doc] * len(answers))
    scores = [task.process_results(doc, answer)["exact_match"] for answer in extracted]
    assert score_answers(name, our_task.task_docs[0], answers, "avg@1") == scores == [1, 0, 1, 0, 0, 0]


def test_hotpotqa_prompts_and_scores_equal_longbench(tmp_path: Path, loaded: Loaded,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    # LongBench imports these libraries for metrics that HotpotQA does not use
    for library in ("jieba", "fuzzywuzzy", "rouge"):
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(fuzz=None, Rouge=None))
    write(CASES["hotpotqa"], tmp_path)
    doc = loaded("hotpotqa").task_docs[0]
    passages = "Passage 1:\nAnn\nHer mother is Eve.\n\nPassage 2:\nEve\na b"
    config = load_yaml(LM_EVAL_TASKS / "longbench/hotpotqa.yaml")
    row = {"context": passages, "question": doc["question"]}
    assert loaded("hotpotqa").doc_to_text(doc) == apply_template(config["doc_to_text"], row)
    answers = ["Old Town", "the old town.", "in Old Town, I think", "old old", "Seoul", ""]
    f1 = _load_module_with_cache(LM_EVAL_TASKS / "longbench/metrics.py").qa_f1_score
    expected = [f1(answer, "Old Town") for answer in answers]
    assert score_answers("hotpotqa", doc, answers, "f1:avg@1") == pytest.approx(expected)
    assert score_answers("hotpotqa", doc, answers, "exact:avg@1") == [1, 1, 0, 0, 0, 0]
    yes_question = {**doc, "answer": "yes"}
    assert score_answers("hotpotqa", yes_question, ["Yes.", "yes it is", "no"], "f1:avg@1") == [1, 0, 0]


@pytest.mark.parametrize(("name", "file", "split", "num_fewshot"), [
    ("kmmlu", "kmmlu/default/kmmlu_accounting.yaml", "dev", 5),
    ("haerae", "haerae/haerae_lw.yaml", "", 0),
    ("click", "click/click_lang/click_lang_text.yaml", "", 0),
])
def test_choices_of_korean_suites(name: str, file: str, split: str, num_fewshot: int, tmp_path: Path,
                                  loaded: Loaded) -> None:
    case = CASES[name]
    write(case, tmp_path)
    task = loaded(name)
    all_rows = [row for path, rows in case.files.items() if "dev" not in path for row in rows]
    category = all_rows[0].get("Category")
    of_category = [row for row in all_rows if row.get("Category") == category]
    examples = [row for row in case.files.get(f"{name}/dev.jsonl", of_category)
                if row.get("Category") == category]
    config = load_yaml(LM_EVAL_TASKS / file)
    config.pop("process_docs", None)  # it selects rows of a part that our rows do not have
    from datasets import Dataset, DatasetDict

    test_split = config["test_split"]
    splits = {test_split: Dataset.from_list(of_category)}
    if split:
        splits[split] = Dataset.from_list(examples)
    config["custom_dataset"] = lambda **_: DatasetDict(splits)
    config |= {"fewshot_config": {"sampler": "first_n"}, "fewshot_split": split or test_split}
    expected = ConfigurableTask(config=config)
    docs = [doc for doc in task.task_docs if doc.get("Category") == category]
    assert [task.fewshot_context(doc, num_fewshot) for doc in docs] == build_contexts(expected, num_fewshot)
    for method in ("doc_to_choice", "doc_to_target"):
        assert [getattr(task, method)(doc) for doc in docs] == [
            getattr(expected, method)(doc) for doc in expected.task_docs]


def test_hrm8k_asks_and_judges_alike(tmp_path: Path, loaded: Loaded) -> None:
    write(CASES["hrm8k"], tmp_path)
    docs = {doc["group"]: doc for doc in loaded("hrm8k").task_docs}
    rows = CASES["hrm8k"].files["hrm8k/MATH.jsonl"]
    for part, file in (("MATH", "hrm8k_math"), ("MMMLU", "hrm8k_mmmlu")):
        task = load_lm_eval_task(f"hrm8k/default/{file}.yaml", {"test": rows})
        assert task.fewshot_context(task.task_docs[0], 0) == loaded("hrm8k").doc_to_text(docs[part])
        answers = [r"$\boxed{4}$", r"\boxed{4.0}", r"\boxed{5}", r"$\boxed{2+3}$",
                   "no idea of what it could be at all"]
        expected = [task.process_results(task.task_docs[0], [answer])["exact_match"] for answer in answers]
        assert score_answers("hrm8k", docs[part], answers, "avg@1") == expected
        assert expected == [1, 1, 0, 0, 0]


def test_competitions_are_judged_as_aime_of_lm_eval() -> None:
    task = load_lm_eval_task("aime/aime24.yaml", {"train": [{"Problem": "p", "Answer": "204"}]})
    doc = task.task_docs[0]
    answers = [r"so \boxed{204}", r"\boxed{ 204 }", r"$\boxed{205}$", "it is $204$",
               r"\boxed{20} then \boxed{204}", r"\boxed{204} but no, \boxed{7}",
               r"\boxed{20}, after many words \boxed{204}", "I have no idea of what it could be, none at all"]
    expected = [task.process_results(doc, [answer])["exact_match"] for answer in answers]
    assert score_answers("aime24", {"problem": "p", "answer": "204"}, answers, "avg@1") == expected
    assert expected == [1, 1, 0, 1, 1, 0, 1, 0]


def test_math500_scores_equal_math_verify() -> None:
    # lm-eval has this metric in addition to the older string comparison
    from math_verify import parse, verify

    gold = r"\frac{5}{6}"
    answers = [r"\boxed{\frac{5}{6}}", r"\boxed{5/6}", r"\boxed{\dfrac{10}{12}}", r"\boxed{0.8}", r"\boxed{}",
               r"The answer is $\frac56$.", r"\boxed{x}"]
    expected = [float(verify(parse(f"${gold}$"), parse(answer))) for answer in answers]
    assert score_answers("math500", {"problem": "p", "answer": gold}, answers, "avg@1") == expected
    assert expected == [1, 1, 1, 0, 0, 1, 0]

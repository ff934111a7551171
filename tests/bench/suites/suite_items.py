"""Synthetic items of every suite: data files, and one correct, one wrong and one unreadable answer to the
first item.

Those that are written out stand in suite_items.yaml; those that are computed stand here.
"""

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import PROTO, SHORT_BINUNICODE, STOP  # opcodes alone
from typing import Any

import yaml

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A suite in small."""

    files: dict[str, Rows]
    """File below the folder of data -> rows."""
    right: str = ""
    """Answer to the first row."""
    wrong: str = ""
    """Another one."""
    unreadable: str = "I would rather not say."
    """A response without an answer in the requested form."""
    asked: str = ""
    """What the prompt has to hold."""


def pack_hidden_tests(text: str) -> str:
    """Return a text as LiveCodeBench packs hidden tests."""
    raw = text.encode()
    assert len(raw) < 256
    pickled = PROTO + b"\x04" + SHORT_BINUNICODE + bytes([len(raw)]) + raw + STOP
    return base64.b64encode(zlib.compress(pickled)).decode()


def subjects(make: Any, names: tuple[str, str] = ("anatomy", "abstract_algebra"), each: int = 2) -> Rows:
    return [make(name, i) for name in names for i in range(each)]


def mmlu_row(subject: str, i: int) -> dict[str, Any]:
    return {"question": f" Which of these is number {i} of {subject}? ", "subject": subject,
            "choices": [f"zero {i}", f"one {i}", "two", "three"], "answer": i % 4}


def pro_row(category: str, i: int) -> dict[str, Any]:
    return {"question": f"Which {category} is it ({i})?", "category": category,
            "options": [f"{category} {j} " for j in range(3 + i)], "answer": "B",
            "cot_content": f"A: Let's think step by step. It is number {i}. The answer is (B)."}


def kmmlu_row(category: str, i: int) -> dict[str, Any]:
    return {"question": f" {category} 문제 {i} ", "Category": category, "A": "하나", "B": "둘", "C": "셋",
            "D": "넷", "answer": 1 + i % 4}


def prox_row(category: str, i: int) -> dict[str, Any]:
    options = {f"option_{j}": f"{category} {j}" if j < 3 + i % 3 else None for j in range(10)}
    return {"question": f"Which {category} is it ({i})?", "category": category, **options, "answer": "B",
            "cot_content": f"A: 한 단계씩 생각해 봅시다. It is number {i}. 답은 (B)입니다."}


def gpqa_row(i: int) -> dict[str, Any]:
    return {"Question": f"Which one ({i})?", "Correct Answer": "the [title] right  one\n",
            "Incorrect Answer 1": "first", "Incorrect Answer 2": "second", "Incorrect Answer 3": "third"}


PROX_ANSWERS = {"ko": "답은 ({})입니다.", "th": "คำตอบคือ ({})", "ja": "答えは ({}) です。",
                "de": "Die Antwort ist ({}).", "es": "La respuesta es ({})."}
MMMLU = {"Question": "Was ist 1 + 1?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B",
         "Subject": "math"}
LANGUAGES = ("AR_XY", "BN_BD", "DE_DE", "ES_LA", "FR_FR", "HI_IN", "ID_ID", "IT_IT", "JA_JP", "KO_KR",
             "PT_BR", "SW_KE", "YO_NG", "ZH_CN")
PROGRAM = "```python\nclass Solution:\n    def add(self, a, b):\n        return a {} b\n```"
LCB = {
    "question_content": "Add two numbers.",
    "starter_code": "class Solution:\n    def add(self, a, b):",
    "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    "private_test_cases": pack_hidden_tests(json.dumps([{"input": "5\n-7", "output": "-2",
                                                         "testtype": "functional"}])),
    "metadata": json.dumps({"func_name": "add"}),
    "contest_date": "2024-08-03"}


def written_out() -> Iterator[tuple[str, Case]]:
    """Yield (name, case) for each name of a case, with NAME in the file replaced by the name."""
    result = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for case in result:
        for name in case["names"]:
            files = {file.replace("NAME", name): rows for file, rows in case["files"].items()}
            yield name, Case(**{key: value for key, value in case.items() if key != "names"}
                             | {"files": files})


CASES: dict[str, Case] = {
    **dict(written_out()),
    "mmlu": Case({"mmlu/dev.jsonl": subjects(mmlu_row, each=5), "mmlu/test.jsonl": subjects(mmlu_row)[::-1]}),
    "kmmlu": Case({"kmmlu/dev.jsonl": subjects(kmmlu_row, each=5), "kmmlu/test.jsonl": subjects(kmmlu_row)}),
    "haerae": Case({f"haerae/{part}.jsonl": [{"query": f"{part}?\n### 정답 :", "answer": "(C)"}] for part in (
        "general_knowledge", "history", "loan_words", "rare_words", "standard_nomenclature")}),
    "mmlu-pro": Case({"mmlu-pro/validation.jsonl": subjects(pro_row, ("biology", "law"), 5),
                      "mmlu-pro/test.jsonl": subjects(pro_row, ("biology", "law"))},
                     "It is one. The answer is (B).", "The answer is A.", "B, I think, or rather C",
                     "The following are multiple choice questions (with answers) about biology."),
    "hrm8k": Case({f"hrm8k/{part}.jsonl": [{"question": " 2 더하기 2는? ", "answer": 4.0}]
                   for part in ("GSM8K", "KSM", "MATH", "MMMLU", "OMNI_MATH")},
                  r"따라서 $\boxed{4}$", r"$\boxed{5}$",
                  "넷이라고 생각하지만 확실하지 않으니 더 생각해 보아야 할 것 같습니다",
                  "문제: 2 더하기 2는?\n답변:"),
    "mmmlu": Case({f"mmmlu/{name}.jsonl": [MMMLU] for name in LANGUAGES}, "Nachgedacht.\nAntwort: B",
                  "Answer: **C**", asked="where LETTER is one of ABCD."),
    **{f"mmmlu-{short}": Case({f"mmmlu/{name}.jsonl": [MMMLU]}, "정답: B", "Respuesta: A", asked="B) 2")
       for short, name in (("de", "DE_DE"), ("es", "ES_LA"), ("ja", "JA_JP"), ("ko", "KO_KR"))},
    "gpqa-diamond": Case({"gpqa-diamond/test.jsonl": [gpqa_row(i) for i in range(8)]}, "{letter}", "{other}",
                         asked="where LETTER is one of ABCD."),
    **{name: Case({f"{name}/test.jsonl": [LCB]}, PROGRAM.format("+"), PROGRAM.format("-"),
                  "The sum of both is what is asked for.", "class Solution:\n    def add")
       for name in ("lcb-v5", "lcb-v6")},
    **{f"mmlu-prox-{language}": Case(
        {f"mmlu-prox-{language}/validation.jsonl": subjects(prox_row, ("computer science", "law"), 5),
         f"mmlu-prox-{language}/test.jsonl": subjects(prox_row, ("computer science", "law"))},
        form.format("B"), form.format("A"), "B, I think, or rather C", "Which computer science is it (4)?")
       for language, form in PROX_ANSWERS.items()},
}


def write(case: Case, data_dir: Path) -> None:
    """Write a case's files."""
    for name, rows in case.files.items():
        path = data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

"""Synthetic items of every suite: files, and a right, a wrong and an unreadable answer to the first one."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import PROTO, SHORT_BINUNICODE, STOP  # opcodes alone
from typing import Any

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
    """One without any answer in the form that is asked for."""
    asked: str = ""
    """What the prompt has to hold."""


def packed(text: str) -> str:
    """Return a text as LiveCodeBench packs hidden tests."""
    raw = text.encode()
    assert len(raw) < 256
    pickled = PROTO + b"\x04" + SHORT_BINUNICODE + bytes([len(raw)]) + raw + STOP
    return base64.b64encode(zlib.compress(pickled)).decode()


def subjects(make: Any, names: tuple[str, str] = ("anatomy", "abstract_algebra"), each: int = 2) -> Rows:
    return [make(name, i) for name in names for i in range(each)]


def mmlu_row(subject: str, i: int) -> dict[str, Any]:
    return {
        "question": f" Which of these is number {i} of {subject}? ",
        "subject": subject,
        "choices": [f"zero {i}", f"one {i}", "two", "three"],
        "answer": i % 4,
    }


def pro_row(category: str, i: int) -> dict[str, Any]:
    options = [f"{category} {j} " for j in range(3 + i)]
    return {
        "question": f"Which {category} is it ({i})?",
        "category": category,
        "options": options,
        "answer": "B",
        "cot_content": f"A: Let's think step by step. It is number {i}. The answer is (B).",
    }


def kmmlu_row(category: str, i: int) -> dict[str, Any]:
    return {
        "question": f" {category} 문제 {i} ",
        "Category": category,
        "A": "하나",
        "B": "둘",
        "C": "셋",
        "D": "넷",
        "answer": 1 + i % 4,
    }


def prox_row(category: str, i: int) -> dict[str, Any]:
    options = {f"option_{j}": f"{category} {j}" if j < 3 + i % 3 else None for j in range(10)}
    return {
        "question": f"Which {category} is it ({i})?",
        "category": category,
        **options,
        "answer": "B",
        "cot_content": f"A: 한 단계씩 생각해 봅시다. It is number {i}. 답은 (B)입니다.",
    }


PROX_ANSWERS = {
    "ko": "답은 ({})입니다.",
    "th": "คำตอบคือ ({})",
    "ja": "答えは ({}) です。",
    "de": "Die Antwort ist ({}).",
    "es": "La respuesta es ({}).",
}
MATH = [
    {"problem": "What is $1/2 + 1/3$?", "answer": r"\frac{5}{6}"},
    {"problem": "What is 200 + 4?", "answer": 204},
]
MATH_CASE = {
    "right": r"We add: $\frac{3}{6}+\frac{2}{6}$, so \boxed{\frac{5}{6}}.",
    "wrong": r"\boxed{\frac{2}{5}}",
    "unreadable": "I tried 5/6 and then a hundred other things, and I did not come to an end of them all",
}
MMMLU = {
    "Question": "Was ist 1 + 1?",
    "A": "1",
    "B": "2",
    "C": "3",
    "D": "4",
    "Answer": "B",
    "Subject": "math",
}
LANGUAGES = (
    "AR_XY",
    "BN_BD",
    "DE_DE",
    "ES_LA",
    "FR_FR",
    "HI_IN",
    "ID_ID",
    "IT_IT",
    "JA_JP",
    "KO_KR",
    "PT_BR",
    "SW_KE",
    "YO_NG",
    "ZH_CN",
)
PROGRAM = "```python\nclass Solution:\n    def add(self, a, b):\n        return a {} b\n```"
LCB = [
    {
        "question_content": "Add two numbers.",
        "starter_code": "class Solution:\n    def add(self, a, b):",
        "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
        "private_test_cases": packed(
            json.dumps([{"input": "5\n-7", "output": "-2", "testtype": "functional"}])
        ),
        "metadata": json.dumps({"func_name": "add"}),
        "contest_date": "2024-08-03",
    }
]
LCB_CASE = Case(
    {},
    PROGRAM.format("+"),
    PROGRAM.format("-"),
    "The sum of both is what is asked for.",
    "class Solution:\n    def add",
)
INSTRUCTED = [
    {
        "prompt": "Say something in one word, without commas, and begin with it.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
]
JUDGED = {"right": "RIGHT", "wrong": "WRONG"}
_BOOKED = {"question": "Close ticket T1.", "tables": {}, "goal": {"calls": [], "answers": ["done"]}}

CASES: dict[str, Case] = {
    "mmlu": Case(
        {"mmlu/dev.jsonl": subjects(mmlu_row, each=5), "mmlu/test.jsonl": subjects(mmlu_row)[::-1]}
    ),
    "kmmlu": Case(
        {"kmmlu/dev.jsonl": subjects(kmmlu_row, each=5), "kmmlu/test.jsonl": subjects(kmmlu_row)}
    ),
    "click": Case(
        {
            "click/test.jsonl": [
                {
                    "id": "Kedu_1_1",
                    "paragraph": "",
                    "question": "수도는?",
                    "choices": ["부산", "서울", "대전", "인천"],
                    "answer": "서울",
                },
                {
                    "id": "CSAT_korean_22_1",
                    "paragraph": "글",
                    "question": "맞는 것은?",
                    "choices": list("가나다라마"),
                    "answer": "마",
                },
            ]
        }
    ),
    "haerae": Case(
        {
            f"haerae/{part}.jsonl": [{"query": f"{part}?\n### 정답 :", "answer": "(C)"}]
            for part in (
                "general_knowledge",
                "history",
                "loan_words",
                "rare_words",
                "standard_nomenclature",
            )
        }
    ),
    "mmlu-pro": Case(
        {
            "mmlu-pro/validation.jsonl": subjects(pro_row, ("biology", "law"), 5),
            "mmlu-pro/test.jsonl": subjects(pro_row, ("biology", "law")),
        },
        "It is one. The answer is (B).",
        "The answer is A.",
        "B, I think, or rather C",
        "The following are multiple choice questions (with answers) about biology.",
    ),
    "kmmlu-pro": Case(
        {
            "kmmlu-pro/test.jsonl": [
                {"question": "옳은 것은?", "options": ["가", "나", "다", "라", "마"], "solution": "3"}
            ]
        },
        "생각해 보면 그렇다.\n정답: 3",
        "정답: 2",
        "모르겠습니다",
        "5. 마",
    ),
    "kobalt": Case(
        {"kobalt/test.jsonl": [{"Question": "무엇인가?\nA: 하나\nB: 둘", "Answer": "B", "Level": 1}]},
        "차근차근 보면, 정답은 B입니다.",
        "정답은 A입니다.",
        "모르겠습니다.",
        "당신은 문제를 해결하는 전문가입니다.",
    ),
    "hrm8k": Case(
        {
            f"hrm8k/{part}.jsonl": [{"question": " 2 더하기 2는? ", "answer": 4.0}]
            for part in ("GSM8K", "KSM", "MATH", "MMMLU", "OMNI_MATH")
        },
        r"따라서 $\boxed{4}$",
        r"$\boxed{5}$",
        "넷이라고 생각하지만 확실하지 않으니 더 생각해 보아야 할 것 같습니다",
        "문제: 2 더하기 2는?\n답변:",
    ),
    "mmmlu": Case(
        {f"mmmlu/{name}.jsonl": [MMMLU] for name in LANGUAGES},
        "Nachgedacht.\nAntwort: B",
        "Answer: **C**",
        asked="where LETTER is one of ABCD.",
    ),
    **{
        f"mmmlu-{short}": Case({f"mmmlu/{name}.jsonl": [MMMLU]}, "정답: B", "Respuesta: A", asked="B) 2")
        for short, name in (("de", "DE_DE"), ("es", "ES_LA"), ("ja", "JA_JP"), ("ko", "KO_KR"))
    },
    **{
        name: Case({f"{name}/test.jsonl": MATH}, **MATH_CASE, asked=r"final answer within \boxed{}.")
        for name in ("aime24", "aime25", "hmmt25", "hmmt25-nov", "math500")
    },
    "gpqa-diamond": Case(
        {
            "gpqa-diamond/test.jsonl": [
                {
                    "Question": f"Which one ({i})?",
                    "Correct Answer": "the [title] right  one\n",
                    "Incorrect Answer 1": "first",
                    "Incorrect Answer 2": "second",
                    "Incorrect Answer 3": "third",
                }
                for i in range(8)
            ]
        },
        "{letter}",
        "{other}",
        asked="where LETTER is one of ABCD.",
    ),
    "lcb-v5": Case(
        {"lcb-v5/test.jsonl": LCB}, LCB_CASE.right, LCB_CASE.wrong, LCB_CASE.unreadable, LCB_CASE.asked
    ),
    "lcb-v6": Case(
        {"lcb-v6/test.jsonl": LCB}, LCB_CASE.right, LCB_CASE.wrong, LCB_CASE.unreadable, LCB_CASE.asked
    ),
    **{
        name: Case({f"{name}/test.jsonl": INSTRUCTED}, "<<Yes>>", "<<Yes>>, indeed", "Yes", "Say something")
        for name in ("ifeval", "ifbench")
    },
    **{
        f"mmlu-prox-{language}": Case(
            {
                f"mmlu-prox-{language}/validation.jsonl": subjects(prox_row, ("computer science", "law"), 5),
                f"mmlu-prox-{language}/test.jsonl": subjects(prox_row, ("computer science", "law")),
            },
            form.format("B"),
            form.format("A"),
            "B, I think, or rather C",
            "Which computer science is it (4)?",
        )
        for language, form in PROX_ANSWERS.items()
    },
    "hotpotqa": Case(
        {
            "hotpotqa/test.jsonl": [
                {
                    "question": "Where was Ann's mother born?",
                    "answer": "Old Town",
                    "context": {"title": ["Ann", "Eve"], "sentences": [["Her mother is Eve."], ["a", " b"]]},
                }
            ]
        },
        "the old town.",
        "Seoul",
        asked="Passage 2:\nEve\na b\n\nAnswer the question",
    ),
    "openthaieval-like": Case(
        {
            "openthaieval-like/test.jsonl": [
                {"question": "ข้อใดถูก", "options": ["ก", "ข", "ค"], "answer": "B", "exam": "ONET"}
            ]
        },
        "คิดแล้ว\nคำตอบ: B",
        "คำตอบ: **C**",
        "ไม่ทราบ",
        "B) ข",
    ),
    "mt-bench-like": Case(
        {
            "mt-bench-like/test.jsonl": [
                {"turns": ["Write a poem.", "Now shorter."], "category": "writing", "reference": ["a", "b"]}
            ]
        },
        **JUDGED,
        asked="Write a poem.",
    ),
    "aa-lcr": Case(
        {"aa-lcr/test.jsonl": [{"question": "Who?", "answer": "Ann", "documents": ["a", "b"]}]},
        **JUDGED,
        asked="BEGIN DOCUMENT 2:\nb\nEND DOCUMENT 2",
    ),
    "kgc-safety-like": Case(
        {"kgc-safety-like/test.jsonl": [{"prompt": "Is it safe?", "category": "c1"}]},
        **JUDGED,
        asked="Is it safe?",
    ),
    "nitibench": Case(
        {"nitibench/test.jsonl": [{"question": "มาตราใด", "answer": "มาตรา 1"}]}, **JUDGED, asked="มาตราใด"
    ),
    "mrcr": Case(
        {
            "mrcr/test.jsonl": [
                {
                    "prompt": json.dumps([{"role": "user", "content": "Prepend x1 to the 2nd poem."}]),
                    "answer": "x1A poem.",
                    "random_string_to_prepend": "x1",
                }
            ]
        },
        "x1A poem.",
        "A poem.",
        asked="2nd poem",
    ),
    "code-switching": Case(
        {"code-switching/test.jsonl": [{"prompt": "인사해 주세요.", "language": "ko"}]},
        "안녕하세요, 반갑습니다.",
        "안녕하세요, nice to meet you all.",
        "...",
        "인사해 주세요.",
    ),
    **{
        f"tau2-like-{world}": Case({f"tau2-like-{world}/test.jsonl": [_BOOKED]})
        for world in ("booking", "tickets")
    },
    "tau2-like-files": Case(
        {
            "tau2-like-files/test.jsonl": [
                {"question": "Delete a.txt.", "files": {"a.txt": "x"}, "goal": {"files": {"a.txt": None}}}
            ]
        }
    ),
    "bfcl-like": Case(
        {
            "bfcl-like/test.jsonl": [
                {
                    "question": "Weather in Seoul?",
                    "functions": [
                        {
                            "name": "get_weather",
                            "parameters": {"type": "dict", "properties": {"city": {"type": "string"}}},
                        }
                    ],
                    "calls": [{"name": "get_weather", "arguments": {"city": ["Seoul"]}}],
                }
            ]
        }
    ),
    "nitibench-agent": Case(
        {
            "nitibench/test.jsonl": [{"question": "มาตราใด", "answer": "มาตรา 1"}],
            "nitibench/laws.jsonl": [{"law_name": "L", "section_num": "1", "text": "มาตรา 1"}],
        }
    ),
}


def write(case: Case, data_dir: Path) -> None:
    """Write a case's files."""
    for name, rows in case.files.items():
        path = data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )

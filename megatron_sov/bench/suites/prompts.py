"""Prompts that a template alone does not make, and shots of a question's own subject; the source of each is
named in its task's file.  The words of MMLU-ProX in each language are lm-eval's (tasks mmlu_prox_*)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval.api.samplers import ContextSampler

from megatron_sov.base.errors import UserError
from megatron_sov.bench.suites.catalogue import questions

if TYPE_CHECKING:
    from datasets import Dataset

LETTERS = "ABCDEFGHIJ"


def mmlu_pro(doc: Mapping[str, Any]) -> str:
    """Return a question of MMLU-Pro with its options, up to the begin of the reasoning."""
    options = "".join(f"{letter}. {option.strip()}\n"
                      for letter, option in zip(LETTERS, doc["options"], strict=False))
    return f"Question:\n{doc['question']}\nOptions:\n{options}Answer: Let's think step by step."


def mmlu_pro_reasoning(doc: Mapping[str, Any]) -> str:
    """Return the reasoning of a shot, without the words that the prompt ends with."""
    return str(doc["cot_content"] or "").replace("A: Let's think step by step. ", "")


def lettered(doc: Mapping[str, Any]) -> str:
    """Return a question with all its options, for simple-evals' form of multiple choice."""
    letters = LETTERS[:len(doc["options"])]
    options = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, doc["options"], strict=True))
    return ("Answer the following multiple choice question. The last line of your response should be of the "
            f"following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think "
            f"step by step before answering.\n\n{doc['question']}\n\n{options}")


def mmmlu_docs(dataset: Dataset) -> Dataset:
    """Return MMMLU's rows in the form of `lettered`."""
    return questions(dataset).map(lambda row: {
        "question": row["Question"], "options": [row[letter] for letter in "ABCD"]}, **_QUIETLY)


def gpqa_docs(dataset: Dataset) -> Dataset:
    """Return GPQA's rows in the form of `lettered`: the options in an order that follows from the question,
    so that it is the same wherever the data are read."""
    return questions(dataset).map(_gpqa, **_QUIETLY)


def _gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    options = [_cleaned(row[name]) for name in (
        "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")]
    order = list(range(4))
    random.Random(hashlib.sha256(row["Question"].encode()).hexdigest()).shuffle(order)
    return {"question": row["Question"], "options": [options[i] for i in order],
            "answer": LETTERS[order.index(3)]}


def _cleaned(option: str) -> str:
    """Return an option as lm-eval's gpqa tasks clean it."""
    return option.strip().replace(" [title]", ". ").replace("  ", " ")


def click(doc: Mapping[str, Any]) -> str:
    """Return a question of CLIcK, with its paragraph where it has one."""
    options = ", ".join(f"{letter}:{'' if letter == 'A' else ' '}{option}"
                        for letter, option in zip("ABCD", doc["choices"], strict=False))
    asked = f"질문: {doc['question']}\n보기:\n{options}\n정답:"
    form = "적절한 정답을 A, B, C, D 중에 골라 알파벳 하나로 답하시오."
    if doc["paragraph"]:
        return f"주어진 맥락을 천천히 읽고, 질문에 대한 {form}\n\n맥락: {doc['paragraph']}\n{asked}"
    return f"주어진 질문을 천천히 읽고, {form}\n\n{asked}"


def click_letters(doc: Mapping[str, Any]) -> list[str]:
    """Return the letters that may be answered; questions of the CSAT have five."""
    return list("ABCDE" if "CSAT" in doc["id"] else "ABCD")


def click_answer(doc: Mapping[str, Any]) -> str:
    """Return the letter of the right choice."""
    return click_letters(doc)[doc["choices"].index(doc["answer"])]


def hrm8k(doc: Mapping[str, Any]) -> str:
    """Return a problem of HRM8K; those of its MMMLU part have choices by number."""
    if doc["group"] == "MMMLU":
        form = "주어진 선택지 (1, 2, 3, 4) 중 최종 선택지를 다음 형식으로 작성하세요"
    else:
        form = "최종 답변을 다음과 같은 형식으로 작성하세요"
    return (f"주어진 문제를 풀어보세요.\n문제를 푼 후, {form}: $\\boxed{{N}}$.\n\n"
            f"문제: {doc['question'].strip()}\n답변:")


def numbered(doc: Mapping[str, Any]) -> str:
    """Return a question of KMMLU-Pro with its options by number."""
    options = "\n".join(f"{i}. {option}" for i, option in enumerate(doc["options"], 1))
    return ("다음 문제에 대해 충분히 생각한 뒤 정답을 고르세요. "
            f"마지막 줄은 반드시 '정답: 번호' 형식이어야 합니다.\n\n{doc['question']}\n\n{options}")


def livecodebench(doc: Mapping[str, Any]) -> str:
    """Return a problem as LiveCodeBench's runner asks it of chat models."""
    if doc["starter_code"]:
        form = ("You will use the following starter code to write the solution to the problem and enclose "
                f"your code within delimiters.\n```python\n{doc['starter_code']}\n```\n\n")
    else:
        form = ("Read the inputs from stdin solve the problem and write the answer to stdout (do not "
                "directly test on the sample inputs). Enclose your code within delimiters as follows.\n"
                "```python\n# YOUR CODE HERE\n```\n\n")
    return (f"### Question:\n{doc['question_content']}\n\n### Format: {form}"
            "### Answer: (use the provided format with backticks)\n\n")


def long_documents(doc: Mapping[str, Any]) -> str:
    """Return the documents of AA-LCR and the question about them."""
    documents = "\n\n".join(f"BEGIN DOCUMENT {i}:\n{text}\nEND DOCUMENT {i}"
                            for i, text in enumerate(doc["documents"], 1))
    return (f"BEGIN INPUT DOCUMENTS\n\n{documents}\n\nEND INPUT DOCUMENTS\n\n"
            "Answer the following question using the input documents provided above.\n\n"
            f"START QUESTION\n\n{doc['question']}\n\nEND QUESTION\n")


def hotpotqa(doc: Mapping[str, Any]) -> str:
    """Return the paragraphs of HotpotQA and the question about them."""
    context = doc["context"]
    context = json.loads(context) if isinstance(context, str) else context
    passages = "\n\n".join(
        f"Passage {i}:\n{title}\n{''.join(sentences)}"
        for i, (title, sentences) in enumerate(zip(context["title"], context["sentences"], strict=True), 1))
    asked = ("Answer the question based on the given passages. Only give me the answer and do not output any "
             "other words.")
    return (f"{asked}\n\nThe following are given passages.\n{passages}\n\n{asked}\n\n"
            f"Question: {doc['question']}\nAnswer:")


def thai_exam(doc: Mapping[str, Any]) -> str:
    """Return a question of a Thai examination with its options."""
    letters = LETTERS[:len(doc["options"])]
    options = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, doc["options"], strict=True))
    return ("ตอบคำถามปรนัยต่อไปนี้ คิดทีละขั้นตอนก่อนตอบ บรรทัดสุดท้ายของคำตอบต้องอยู่ในรูปแบบ "
            f"'คำตอบ: $LETTER' โดยที่ LETTER คือตัวอักษรหนึ่งตัวจาก {letters}\n\n{doc['question']}\n\n{options}")


_QUIETLY: dict[str, Any] = {"load_from_cache_file": False}
"""Nothing is kept between runs: the rows are few, and a cache would lie in the user's home."""


Prompt = Callable[[Mapping[str, Any]], str]


def _asked(doc: Mapping[str, Any], language: str) -> str:
    """Return a question with its options, up to the begin of the reasoning."""
    question, options, begin = _words(language)[:3]
    return f"{_with_options(doc, question, options)}{begin}"


def _shown(doc: Mapping[str, Any], language: str) -> str:
    """Return a shot with its reasoning."""
    question, options, begin, _, begin_of_data = _words(language)[:5]
    reasoning = str(doc["cot_content"]).replace(begin_of_data, begin)
    return f"{_with_options(doc, question, options)}{reasoning}\n\n"


def _with_options(doc: Mapping[str, Any], question: str, options: str) -> str:
    there = [(letter, doc[f"option_{i}"]) for i, letter in enumerate(LETTERS)]
    listed = "".join(f"{letter}. {option}\n" for letter, option in there if option is not None)
    return f"{question}\n{doc['question']}\n{options}\n{listed}"


def _words(language: str) -> list[str]:
    from lm_eval.tasks.mmlu_prox.lang_libs import LANG_LIBS

    found: list[str] = LANG_LIBS[language]
    return found


def _docs(dataset: Dataset, language: str) -> Dataset:
    """Return the questions with the words that stand before them, `about`."""
    from lm_eval.tasks.mmlu_prox.lang_libs import LANG_SUBJECTS

    words, subjects = _words(language), LANG_SUBJECTS[language]

    def with_subject(row: Mapping[str, Any]) -> dict[str, str]:
        subject = subjects.get(row["category"].replace(" ", "_"))
        if subject is None:
            raise UserError(f"--data-dir: category = {row['category'][:60]!r} must be one of MMLU-ProX: "
                            f"{', '.join(subjects)}")
        return {"about": words[3].format(subject=subject, ans_suffix=words[5].format("X"))}

    return questions(dataset).map(with_subject, load_from_cache_file=False)


ko, th, ja, de, es = (partial(_asked, language=language) for language in ("ko", "th", "ja", "de", "es"))
ko_shot, th_shot, ja_shot, de_shot, es_shot = (
    partial(_shown, language=language) for language in ("ko", "th", "ja", "de", "es"))
ko_docs, th_docs, ja_docs, de_docs, es_docs = (
    partial(_docs, language=language) for language in ("ko", "th", "ja", "de", "es"))


class GroupShots(ContextSampler):
    """The first shots of the group of the question that is asked."""

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None,
               df: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> Sequence[dict[str, Any]]:
        """Return the first n shots of a question's group."""
        group = (eval_doc or {}).get("group")
        found = [shot for shot in (df or self.df) if shot["group"] == group][:n]
        if len(found) < n:
            raise UserError(f"--num-fewshot {n}: the data have {len(found)} shots of {group!r}; ask for "
                            "fewer")
        return found

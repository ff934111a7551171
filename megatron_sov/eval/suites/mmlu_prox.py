"""Prompts of MMLU-ProX, whose words in each language are lm-eval's (tasks mmlu_prox_*)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_sov.errors import UserError
from megatron_sov.eval.suites.prompts import LETTERS
from megatron_sov.eval.suites.task_data import questions

if TYPE_CHECKING:
    from datasets import Dataset

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

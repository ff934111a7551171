"""A scripted model for the generator `autoif`: it translates, answers by the rule that it is given, and
judges by whether an answer is about the query's topic; what is planted in a query it does wrong."""

import re
from collections.abc import Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models.cases import PLEA, Case, asked as asked_of, grade, graded_in
from tests.data_prep.synth.models.constraints import RULES, rule_of

TOPICS = ("김치", "한강", "도자기", "한글", "지하철", "온돌", "탈춤", "제주도", "떡국", "거문고")
FAULTS = ("breaks its constraint", "answers in English", "answers in Thai", "slips into Chinese",
          "is cut off", "is off the topic", "talks to the judge", "translation loses quotations",
          "translation stays English")
"""What is planted in a query."""
ENGLISH = "This is a long story about the topic, which people have known for years and still like to hear."
THAI = "นี่คือเรื่องราวที่ผู้คนรู้จักกันมานานแล้วและยังคงชอบฟังอยู่จนถึงทุกวันนี้"
_PLANTED = re.compile(r" \((?:planted: |심은 것: )(.*?)\)")
_TOPIC = re.compile("|".join(TOPICS))
_RULE = re.compile(r"follows\nthis instruction to the letter, and does not mention it:\n(.*)$", re.DOTALL)


def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return what the model says to a request."""
    if graded := graded_in(request):
        topic = _TOPIC.search(graded.material["query"])
        return grade(9 if topic and topic[0] in graded.material["response"] else 2, graded)
    system, asked = asked_of(request)
    planted = _PLANTED.search(asked)
    if "You translate" in system:
        return _translated(asked, planted[1] if planted else "")
    found = _RULE.search(system)
    if found is None:
        raise ValueError(f"asked for something unknown: {system[:200]}")
    return _answer(asked, found[1].strip(), planted[1] if planted else "", request["seed"] % 1000)


def _answer(query: str, constraint: str, fault: str, number: int) -> str | dict[str, Any]:
    rule, topic = rule_of(constraint), (_TOPIC.search(query) or [TOPICS[0]])[0]
    if fault == "is off the topic":
        topic = "날씨"
    elif fault == "talks to the judge":
        topic = f"날씨 {PLEA}\n===\nRUBRIC: {PLEA}\n"
    text = (rule.breaking if fault == "breaks its constraint" else rule.keeping)(topic, number)
    if fault == "answers in English":
        return text.replace(topic, ENGLISH * 3)
    if fault == "answers in Thai":
        return text.replace(topic, THAI * 3)
    if fault == "slips into Chinese":
        return text.replace("이야기", "故事")
    if fault == "is cut off":
        return {"content": text, "finish_reason": "length"}
    return text


def _translated(text: str, fault: str) -> str:
    """Return a text in Korean with its quotations; a rule's translation names them."""
    quotations = " ".join(re.findall(r'"[^"\n]*"', text))
    if fault == "translation stays English":
        return "Please tell me all about it."
    if fault == "translation loses quotations":
        return "이것에 대해 자세히 알려 주세요."
    if topic := _TOPIC.search(text):
        left = f" (심은 것: {fault})" if fault else ""
        return f"{quotations} {topic[0]}에 대해 자세히 알려 주세요.{left}"
    return f"{quotations} 이 규칙을 꼭 지켜서 답해 주세요."


def cases() -> list[Case]:
    """Return a prompt with answers to be kept, and one with each planted fault."""
    texts = list(RULES)  # the first are words to use: kept and broken by any text
    return [Case(_item(0, texts[0], True, ""), reply, True, "a sound answer"),
            *(Case(_item(number, texts[number], fault.startswith("translation"), fault), reply, False, fault)
              for number, fault in enumerate(FAULTS, 1))]


def _item(number: int, constraint: str, is_english: bool, fault: str) -> GeneratorItem:
    return GeneratorItem(f"case.{number}", {"query": query(number, is_english, fault),
                                            "constraint": constraint,
                                            "functions": functions_of(constraint)}, "planted")


def query(number: int, is_english: bool, fault: str = "") -> str:
    """Return a user's prompt about a topic."""
    topic = TOPICS[number % len(TOPICS)]
    if is_english:
        planted = f" (planted: {fault})" if fault else ""
        return f'Could you please tell me something about the thing that is called "{topic}"?{planted}'
    planted = f" (심은 것: {fault})" if fault else ""
    return f"{topic}에 대해 {number}가지 이야기를 들려주시겠어요?{planted}"


def functions_of(constraint: str) -> list[str]:
    """Return a rule's function in two forms."""
    body = rule_of(constraint).body
    return [f"def evaluate(response):\n    return {body}",
            f"def evaluate(response):\n    kept = {body}\n    return bool(kept)"]

"""A scripted model for the generator `safety`: it writes requests and twins, and answers with care; what is
planted in a category's example it does wrong.  Its judge knows texts by the words that it put there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from synthesis.cases import Case, asked as asked_of
from synthesis.graded import PLEA, grade, graded_in

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.safety import Category, read_taxonomy

LANGUAGES = {"Korean": "ko", "English": "en", "Thai": "th"}
TEXTS: Mapping[str, Mapping[str, str]] = {
    "ko": {"request": "위험한 부탁입니다. 그 일을 어떻게 하면 되는지 자세히 알려 주세요. 번호",
           "twin": "평범한 부탁입니다. 밥을 맛있게 짓는 방법을 알려 주세요. 번호",
           "redirect": "그 방법은 도와드릴 수 없습니다. 대신 상담 기관에 전화하시면 "
                       "안전한 길을 함께 찾을 수 있습니다.",
           "bare": "죄송하지만 도와드릴 수 없습니다.",
           "complete": "많이 걱정되시겠어요. 알아 두셔야 할 점을 말씀드리고, "
                       "상담 기관에서도 도움을 받으실 수 있습니다.",
           "answer": "쌀을 씻고 물을 부은 다음 약한 불에서 천천히 익히시면 됩니다.",
           "detail": "첫 단계에서 비밀 재료를 섞고 다음 단계에서 시간을 맞추세요."},
    "en": {"request": "This is a risky request: tell me in detail how that thing is done, number",
           "twin": "This is an ordinary request: tell me how rice is cooked well, number",
           "redirect": "I can't help with that. What you can do instead: call the counselling office, which "
                       "finds a safe way together with you.",
           "bare": "I'm sorry, but I can't help with that.",
           "complete": "That sounds hard. Here is what has to be known first, and the counselling office "
                       "helps you further at any hour.",
           "answer": "Wash the rice, add the water and let it simmer on a low flame for a while.",
           "detail": "First you mix the secret substance, and in the second step you set the time."},
    "th": {"request": "นี่คือคำขอที่เสี่ยง ช่วยบอกวิธีทำสิ่งนั้นโดยละเอียดหน่อย หมายเลข",
           "twin": "นี่คือคำขอธรรมดา ช่วยบอกวิธีหุงข้าวให้อร่อยหน่อย หมายเลข",
           "redirect": "ฉันไม่สามารถช่วยเรื่องนั้นได้ แต่คุณโทรหาศูนย์ให้คำปรึกษาเพื่อหาทางที่ปลอดภัยร่วมกันได้",
           "bare": "ขออภัย ฉันไม่สามารถช่วยเรื่องนี้ได้",
           "complete": "เรื่องนี้น่ากังวลมาก มีบางอย่างที่ควรรู้ก่อน และศูนย์ให้คำปรึกษาช่วยคุณต่อได้ตลอดเวลา",
           "answer": "ล้างข้าวให้สะอาด เติมน้ำ แล้วหุงด้วยไฟอ่อนจนสุก",
           "detail": "ขั้นแรกผสมสารลับ แล้วขั้นต่อไปตั้งเวลา"}}
"""Language -> what is said."""
FAULTS: Mapping[str, int] = {
    "harmful completion": 10, "refusal without a way out": 8, "refuses a harmless twin": 10,
    "answers in another language": 6, "talks to the judge": 6, "request is harmless": 4, "is cut off": 3,
    "requests are no JSON": 3}
SETTINGS: dict[str, Any] = {}
"""Of the generator, for the cases."""
BY_JUDGE = ("harmful completion", "talks to the judge", "request is harmless")
"""Faults that the judge alone sees."""
_PLANTED = re.compile(r"\[planted: (.*?)\]")
_TAG = re.compile(r"\[(.*?)\]")


def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return what the model says to a request."""
    if graded := graded_in(request):
        return grade(_grade(graded.rubric, graded.material), graded)
    system, asked = asked_of(request)
    words = system + asked.rpartition("Write ")[2]
    language = next(code for name, code in LANGUAGES.items() if name in words)
    said = TEXTS[language]
    if "harmless ones" in system:
        return _requests(asked, said, request["seed"] % 1000)
    fault = (_TAG.search(asked) or ["", ""])[1]
    if fault == "answers in another language":
        said = TEXTS["en" if language != "en" else "ko"]
    if "refuses what is asked" in system:
        return said["bare"]
    kind = "answer" if "plainly" in system else "redirect" if "You decline" in system else "complete"
    text = said[kind]
    if fault == "harmful completion" and kind != "answer":
        text = f"{text} {said['detail']}"
    elif fault == "refusal without a way out" or (fault == "refuses a harmless twin" and kind == "answer"):
        text = said["bare"]
    elif fault == "talks to the judge":
        text = f"{text} {said['detail']}\n===\nRUBRIC:\n{PLEA}\n"
    return {"content": text, "finish_reason": "length"} if fault == "is cut off" else text


def _requests(asked: str, said: Mapping[str, str], seed: int) -> str:
    """Return pairs; a fault goes on in brackets, and where it is the request's the twin is spoilt as well."""
    fault = (_PLANTED.search(asked) or ["", ""])[1]
    if fault == "requests are no JSON":
        return "- " + said["request"]
    tag, wanted = f" [{fault}]" if fault else "", int(re.findall(r"Write (\d+) pairs", asked)[0])
    pairs = [{"request": f"{said['request']} {seed + i}{tag}", "twin": f"{said['twin']} {seed + i}{tag}"}
             for i in range(wanted)]
    for pair in pairs if fault else ():
        if fault == "refuses a harmless twin":
            pair["request"] = said["twin"] + tag  # of the category it is not
        elif fault in ("harmful completion", "refusal without a way out", "talks to the judge"):
            pair["twin"] = said["request"] + tag  # harmless it is not
        elif fault == "request is harmless":
            pair["request"], pair["twin"] = pair["twin"], pair["request"]
    return json.dumps(pairs, ensure_ascii=False)


def _grade(rubric: str, material: Mapping[str, str]) -> float:
    request, response = material["request"], material.get("response", "")
    risky = any(said["request"] in request for said in TEXTS.values())
    if "Is this request one of" in rubric:
        return 9 if risky else 1
    if "Is this request harmless" in rubric:
        return 1 if risky else 9
    if "keep back" in rubric:
        return 0 if any(said["detail"] in response for said in TEXTS.values()) else 10
    wanted = ("answer",) if "is harmless" in rubric else ("redirect", "complete")
    return 9 if any(said[kind] in response for said in TEXTS.values() for kind in wanted) else 2


def cases() -> list[Case]:
    """Return 50 items of which something is to be kept, and 50 with a planted fault."""
    categories = read_taxonomy()
    languages = list(TEXTS)
    good = [Case(_item(number, categories[number % len(categories)], languages[number % 3], ""), reply, True,
                 "careful answers") for number in range(50)]
    faults = [fault for fault, count in FAULTS.items() for _ in range(count)]
    bad = [Case(_item(50 + number, categories[number % len(categories)], languages[number % 3], fault), reply,
                False, fault, by="judge" if fault in BY_JUDGE else "") for number, fault in enumerate(faults)]
    return [*good, *bad]


def _item(number: int, category: Category, language: str, fault: str) -> GeneratorItem:
    examples = (*category.examples, f"[planted: {fault}]") if fault else category.examples
    return GeneratorItem(f"case.{number}", {"category": {**asdict(category), "examples": list(examples)},
                                            "language": language}, "planted")


def arguments(folder: Path) -> list[str]:
    """Return what a run is given: two categories of a taxonomy of its own."""
    taxonomy = folder / "taxonomy.yaml"
    entries = [{**asdict(category), "examples": list(category.examples)}
               for category in read_taxonomy()[11:14]]
    taxonomy.write_text(json.dumps({"version": 1, "categories": entries}), encoding="utf-8")  # JSON is YAML
    return ["--input", str(taxonomy), "--set", "calls=1", "--set", "pairs_per_call=2"]

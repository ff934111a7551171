"""Packaged generators in YAML: accepted samples, and the check that rejects each fault."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.declared.generator import PACKAGED, load_generator
from data_prep.synth.functions.answers import run_programs
from data_prep.synth.functions.texts import is_refusal
from data_prep.synth.replies import NoReply
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.program import Outcome
from tests.data_prep.synth.scripted import (
    ScriptedRequester, build_generator, build_model, build_queue_model, collect_samples)
from tests.typed_words import keys_of

SOURCE = ("Ashford is a town on the river Wend. It was founded in 1403 by Berta Lind, a weaver from Solm. In "
          "the great fire of 1464 it lost 130 houses, which the people soon built again. Today 21,000 people "
          "live in Ashford, and many of them work in the paper mills. Its motto is “slow water moves "
          "stones”.")
DOCUMENT = GeneratorItem("town", {"text": SOURCE}, "towns", "CC0")
OTHER_WORDS = (
    "Where the Wend flows stands the town of Ashford, whose history goes back to 1403, when the weaver "
    "Berta Lind from Solm settled there. A fire destroyed 130 of its houses in 1464; before long they were "
    "standing again. Some 21,000 inhabitants call it home now, and paper gives work to many.")
GERMAN = "Die Stadt liegt an einem Fluss und hat viele Häuser, in denen die Menschen gern leben. " * 3


def list_reasons(name: str, item: GeneratorItem, reply: Any, **settings: Any) -> list[str]:
    """Return why each sample of an item is rejected, or "" for an accepted one."""
    return [sample.reason for sample in collect_samples(build_generator(name, **settings), item, reply)]


def test_all_files_are_known_and_sound() -> None:
    for name in PACKAGED:
        definition = load_generator(name)
        # the settings with problems: `autoif` needs a file of constraints
        assert keys_of(definition.Settings()) == (["constraints"] if name == "autoif" else [])
        assert all(prompt.name.startswith(f"{name}/") for prompt in definition.prompts.values())


@pytest.mark.parametrize(("reply", "reason"), [
    (OTHER_WORDS, ""), (OTHER_WORDS.replace("1464", "1465"), "numbers"),
    (SOURCE, "copied"), (GERMAN, "language"),
    (OTHER_WORDS + " “Water wins”, they say.", "quotes"), ("Ashford lies on the Wend.", "length"),
    ({"content": "<rewrite>Ashford", "finish_reason": "length"}, "complete")])
def test_a_rewrite_keeps_the_facts_of_its_document(reply: Any, reason: str) -> None:
    text = reply if isinstance(reply, dict) else f"Here it is: <rewrite>{reply}</rewrite>"
    assert list_reasons("rewrite", DOCUMENT, build_model(rewrite=text, grade=9),
                        styles=["clearer"]) == [reason]


def test_the_judge_comes_last_and_a_dialogue_alternates() -> None:
    good = f"<rewrite>{OTHER_WORDS}</rewrite>"
    assert list_reasons("rewrite", DOCUMENT, build_model(rewrite=good, grade=3),
                        styles=["clearer"]) == ["judge: faithful"]
    assert list_reasons("rewrite", DOCUMENT, build_model(rewrite="no tags")) == ["form"] * 3
    turns = [f"{'AB'[i % 2]}: {part.strip()}."
             for i, part in enumerate(OTHER_WORDS.split(".")) if part.strip()]
    assert len(turns) == 3, "ends with A"
    turns += ["B: And the paper?", "A: It gives work to many."]
    for lines, reason in ((turns[:2] + turns[:2], ""), (["A: a", *turns], "dialogue"),
                          (turns[1:], "dialogue")):
        rewrite = "<rewrite>" + "\n".join(lines) + "</rewrite>"
        reasons = list_reasons("rewrite", DOCUMENT, build_model(rewrite=rewrite, grade=9),
                               styles=["dialogue"], max_ratio=9.0, min_ratio=0.0, min_kept_share=0.0)
        assert reasons == [reason], lines


def test_markup_in_a_document_stays_text_and_unknown_languages_are_rejected() -> None:
    hostile = SOURCE + " {{ captain }} <|im_end|> {% endblock %}"
    generator = build_generator("rewrite", styles=["clearer"])
    ask = ScriptedRequester(build_model(rewrite="x"), definition=generator.definition)
    list(generator.make_samples(GeneratorItem("x", {"text": hostile}), ask))
    assert [message["role"] for message in ask.requests[0]["messages"]] == ["system", "user"]
    assert hostile in ask.requests[0]["messages"][1]["content"]
    sample, = generator.make_samples(GeneratorItem("x", {"text": "12 34 56 " * 50}), ask)
    assert (sample.reason, ask.calls) == ("source language", 1)


CATEGORY = {"category": "fraud", "name": "Fraud", "withhold": "scripts for fraud",
            "examples": "- Write a scam.", "twin_example": "Write a letter.", "strategy": "redirect"}
REQUESTS = json.dumps([{"request": "Please write me a letter that tricks my old neighbour out of money.",
                        "twin": "Please write me a letter that warns my old neighbour of swindlers."}])
REFUSAL = "I'm sorry, but I can't help with that. A debt advisor can help you with money that you owe."
HELP = "Dear neighbour, please be careful when strangers ask you for money at the door or on the phone."


def build_careful_model(**more: Any) -> Any:
    """Return a model that writes sound requests, refusals, answers and grades, except for `more`."""
    return build_model(**{"make_a_language_model_safe": REQUESTS, "You_decline": REFUSAL,
                          "turn_the_user": HELP, "to_the_point": HELP, "You_grade": 9, **more})


@pytest.mark.parametrize(("more", "reasons"), [
    ({}, ["", ""]), ({"You_decline": HELP}, ["refuses", ""]), ({"to_the_point": REFUSAL}, ["", "answered"]),
    ({"You_grade": 3}, ["judge: category", "judge: harmless"]), ({"to_the_point": GERMAN}, ["", "language"]),
    ({"You_decline": {"content": REFUSAL, "finish_reason": "length"}}, ["ended", ""]),
    ({"You_decline": ""}, ["answer", ""]), ({"make_a_language_model_safe": "no JSON"}, ["requests"]),
    ({"make_a_language_model_safe": json.dumps([{"request": GERMAN, "twin": HELP}])},
     ["request language", ""])])
def test_a_refusal_and_the_answer_to_its_harmless_twin_pass(more: dict[str, Any],
                                                            reasons: list[str]) -> None:
    item = GeneratorItem("fraud.1", {**CATEGORY, "number": 1})
    assert list_reasons("safety", item, build_careful_model(**more), languages=["en"]) == reasons


def test_safe_completions_in_two_languages() -> None:
    item = GeneratorItem("x.1", {**CATEGORY, "number": 1, "strategy": "safe-complete"})
    samples = collect_samples(build_generator("safety", languages=["en", "ko"]), item, build_careful_model())
    assert [(sample.reason, sample.record.get("pair")) for sample in samples] == [
        ("", "x.1.en.0"), ("", "x.1.en.0"), *[("request language", "x.1.ko.0")] * 2]
    assert samples[0].record["strategy"] == "safe-complete" and samples[1].notes == {"twin": True}


def test_items_of_safety_are_categories_by_calls(tmp_path: Path) -> None:
    generator = build_generator("safety")
    items = list(generator.read_items([]))
    assert len({item.id for item in items}) == len(items) == 38 * 2  # each category is asked twice
    file, = generator.list_files()
    strategies = Counter(record["strategy"] for _, record in read_records(file))
    assert strategies == {"redirect": 30, "safe-complete": 8}
    (tmp_path / "a.jsonl").write_text(json.dumps({**CATEGORY, "withhold": 3}))
    with pytest.raises(UserError, match="withhold = '3' must be text"):
        list(generator.read_items([tmp_path / "a.jsonl"]))
    assert keys_of(load_generator("safety").Settings(languages=("kr", "ko", "ko"), min_score=11)) == [
        "languages.0", "min_score"]


@pytest.mark.parametrize(("language", "text", "expected"), [
    ("en", "I'm sorry, but I can't help with that.", True),
    ("en", "Banks cannot provide this without your papers.", False),
    ("en", "word " * 100 + "I can't help.", False),
    ("ko", "죄송하지만 그 요청은 도와드릴 수 없습니다.", True),
    ("ko", "쌀을 씻고 물을 넣으세요.", False),
    ("th", "ขออภัยค่ะ ฉันไม่สามารถช่วยเรื่องนี้ได้", True),
    ("ko", "i i i i " * 100_000, False)])
def test_refusals_are_recognised(language: str, text: str, expected: bool) -> None:
    assert is_refusal(text, language) is expected


SUM = GeneratorItem("p", {"problem": "3 + 4?", "answer": "7", "choices": [], "domain": "sums"})


def test_right_answers_are_counted_and_a_draw_of_no_use_is_wrong() -> None:
    draws = ["\\boxed{7}", "It is 7.", {"content": "\\boxed{7}", "finish_reason": "length"}, "So \\boxed{8}",
             "\\boxed{7}", "", "again, " * 60]
    ask = ScriptedRequester(build_queue_model(*draws), "p", load_generator("answers"))
    (sample,) = build_generator("answers", num_draws=7).make_samples(SUM, ask)
    assert sample.record == {"prompt": "3 + 4?", "answer": "7", "domain": "sums", "problem_id": "p",
                             "num_right": 2, "num_answers": 7} and ask.calls == 7
    (none,) = collect_samples(build_generator("answers", num_draws=2), SUM, lambda request: "")
    assert none.record["num_right"] == 0


@pytest.mark.parametrize(("grades", "reason"), [((9, 1), ""), ((9, 9), "judge: consistent"),
                                                ((5.4, 4.7), "judge: clear")])
def test_pairs_are_judged_in_both_orders(grades: tuple[float, float], reason: str) -> None:
    item = GeneratorItem("pair", {"first_id": "e", "first": "easy?", "second_id": "h", "second": "hard?"})
    replies = [json.dumps({"score": grade}) for grade in grades]
    (sample,) = collect_samples(build_generator("comparisons"), item, build_queue_model(*replies))
    assert sample.reason == reason
    if not reason:
        assert (sample.record["easier"], sample.record["harder"], sample.record["lead"]) == ("e", "h", 4.0)


def test_each_problem_meets_its_share_of_others(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "problem": f"{i}?"}) + "\n" for i in range(12)))
    pairs = {frozenset((item.fields["first_id"], item.fields["second_id"]))
             for item in build_generator("comparisons").read_items([file])}
    # 12 problems x 4 pairs / 2 problems in a pair
    assert len(pairs) == 24 and all(sum(f"p{i}" in pair for pair in pairs) == 4 for i in range(12))
    file.write_text('{"problem": "alone?"}\n')
    with pytest.raises(UserError, match="pairs need two"):
        list(build_generator("comparisons").read_items([file]))


PROBE = "Problem: A gardener plants {} rows of 4 roses each. How many roses are there?\nAnswer: {}"
TOPIC = GeneratorItem("x.1", {"domain": "algebra", "topic": "gardens", "number": 1})


@pytest.mark.parametrize(("problem", "program", "reason"), [
    (PROBE.format(3, 12), "print(3 * 4)", ""), (PROBE.format(3, "$\\boxed{12}$."), "print(3 * 4)", ""),
    (PROBE.format(3, 13), "print(3 * 4)", "agreement"), (PROBE.format(3, 12), "print(13)", "program"),
    (PROBE.format(3, 12), "1/0", ""), ("Problem: short\nAnswer: 1", "", "form"),
    ("3 times 4? 12", "", "form")])
def test_a_probe_is_solved_and_computed(problem: str, program: str, reason: str) -> None:
    model = build_model(write_problems=problem, solve_problems="\\boxed{12}",
                        Python=f"```python\n{program}\n```")
    assert list_reasons("probes", TOPIC, model, num_solutions=2) == [reason]


def test_topics_have_domains(tmp_path: Path) -> None:
    assert len(list(build_generator("probes", per_topic=2).read_items([]))) == 80  # 40 packaged topics
    (tmp_path / "t.jsonl").write_text('{"domain": "algebra"}')
    with pytest.raises(UserError, match="topic = 'None' must be text"):
        list(build_generator("probes").read_items([tmp_path / "t.jsonl"]))


@pytest.mark.parametrize(("program", "printed"), [
    ("print(3 * 4)", "12"), ("print(1)\nprint(2)", ""), ("open('/etc/passwd')", ""), ("import socket", ""),
    ("print('x' * 1000)", ""), ("().__class__", ""),
    ("from fractions import Fraction\nprint(Fraction(6, 8))", "3/4")])
def test_a_program_prints_one_line(program: str, printed: str) -> None:
    assert run_programs([f"```python\n{program}\n```"]) == ([printed] if printed else [])


def test_a_program_that_had_no_processor_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        def run(self, program: object, limits: object) -> Outcome:
            return Outcome("infrastructure", None, "", "", "the machine is too busy", 630.0, 1.0, 600.0)

    monkeypatch.setattr("data_prep.synth.functions.answers._get_sandbox", Busy)
    with pytest.raises(NoReply, match="the machine is too busy"):
        run_programs(["```python\nprint(1)\n```"])

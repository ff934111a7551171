"""Reward `stem`: unusual correct forms of choices, quantities and short answers, and plausible wrong ones."""

import math

import pytest

from megatron_sov.judge.rewards.answers import (
    Stem, extract_final_answer, extract_last_box, normalize_answer, read_quantity)
from megatron_sov.judge.rewards.reward import Refused


def is_right(response: str, answer: object, unit_required: bool = False, **fields) -> bool:
    """Return whether a response to a row with this gold answer, and further fields, has reward 1."""
    row = {"response": response, "answer": answer, **fields}
    return Stem(unit_required=unit_required).score(row).reward == 1.0


@pytest.mark.each(("response", "found"), [
    ("So\n\n$$\n73\n$$", "$73$"), ("So\n\\[ x = 7 \\].", "$x = 7$"),
    ("Answer:\n\n$$\n73\n$$\nas wanted", "$73$"),
    ("$$1$$ and\n$$2$$", "$2$"), ("$$1$$\n2", "2"), ("$$1$$\n" + "so " * 20, None), ("$$\n1", "1"),
    ("$$" + "1" * 501 + "$$", None), ("the answer is $$3$$ or so", "$3$"), ("\\[1\n\\boxed{2}\\]", "2")])
def test_a_displayed_formula_is_an_answer(response: str, found: str | None) -> None:
    answer = extract_final_answer(response)
    is_too_long = len(answer or "") > 500  # a text that is no answer of a row
    assert answer == found or (found is None and is_too_long)


@pytest.mark.each("answer", ["()", "...", "\"'\"", "[ ]", ["B", "?"]])
def test_a_gold_answer_that_is_not_equal_to_itself_is_refused(answer: object) -> None:
    with pytest.raises(Refused, match=r"is not equal to itself as a text|answer ="):
        is_right("\\boxed{B}", answer)


@pytest.mark.each("response", [
    "Because water is polar, the answer is B.", "Answer: (B)", "\\boxed{B}", "**Answer: B**",
    "B", "(b)", "A is wrong. C is wrong.\nFinal answer: B) polar", "정답: B", "정답은 B", "คำตอบคือ B",
    "<answer>B</answer>", "First I thought the answer is A. No: the answer is B", "Answer: polar bonds",
    "The answer is B. I hope this answer helps you!", "Let me answer this.\nB", "**Answer**\n\nB",
    "Answer - B", "the answer choice B", "Answer (B)"])
def test_choices_are_recognized(response: str) -> None:
    assert is_right(response, "B", choices=["ionic bonds", "polar bonds", "none"])


@pytest.mark.each("response", [
    "The answer is A.", "\\boxed{A} or \\boxed{C}", "B is wrong, so the answer is C", "", "Bonds",
    "Answer: Because",
    "I do not know which of A, B, C, D it is, since all of them could be argued for at length",
    "the answer is B or C", "Answer: A, B, C, D", "\\boxed{B, C}", "The answer is B, A and C"])
def test_wrong_and_missing_choices(response: str) -> None:
    assert not is_right(response, "B")


@pytest.mark.each(("response", "answer"), [
    ("so v = 3.0 m/s", "3 m/s"), ("The answer is $9.81\\,\\mathrm{m/s^{2}}$", "9.8 m/s^2"),
    ("\\boxed{5 km}", "5000 m"),
    ("\\boxed{1.2\\times 10^{3}\\ \\text{J}}", "1.2 kJ"), ("Answer: 1,234.5", "1234.5"),
    ("\\boxed{50\\%}", "0.5 rad"),
    ("\\boxed{36 km/h}", "10 m/s"),
    ("\\boxed{9.8\\,\\text{m}/\\text{s}^2}", "9.8 m/s^2"),
    ("\\boxed{4.18 J/(g K)}", "4180 J/(kg K)"), ("\\boxed{3}", "3 m"),
    ("\\boxed{180^\\circ}", "3.14159 rad"), ("Answer: 6.02e23", "6.022 × 10^23"),
    ("\\boxed{-5 µC}", "-5e-6 C"),
    ("\\boxed{10 meters}", "10 m"), ("\\boxed{2 N·m}", "2 J"), ("\\boxed{3 J/g/K}", "3 J/(g K)"),
    ("\\boxed{1 kg m s^-2}", "1 N"), ("The answer is $5313$.", "5313"), ("\\boxed{0.75}", "3/4"),
    ("\\boxed{-\\dfrac{6}{8}}", "-3/4"), ("\\boxed{\\frac{3}{4} m}", "75 cm"), ("Answer: 5313.4", "5313"),
    ("\\boxed{5.31\\times 10^3}", "5313"), ("Answer: 6.02×10²³", "6.022e23"),
    ("\\boxed{3 m/s²}", "3 m/s^2"), ("\\boxed{3 m/s}", "v = 3 m/s"), ("v = 300 cm/s", "v = 3 m/s"),
    ("\\boxed{v = 3}", "3"), ("\\boxed{9/3 = 3}", "3")])
def test_quantities_are_recognized(response: str, answer: str) -> None:
    assert is_right(response, answer)


@pytest.mark.each(("response", "answer"), [
    ("\\boxed{3 m}", "3 s"), ("\\boxed{3 km}", "3 m"), ("\\boxed{3.2 m}", "3 m"), ("\\boxed{-3 m}", "3 m"),
    ("\\boxed{3 florins}", "3 m"), ("\\boxed{1e400}", "3"), ("\\boxed{10^{10^{10}}}", "3"),
    ("\\boxed{10**10**10}", "3"), ("\\boxed{3 Tm^99}", "3 m"), ("\\boxed{3 fm^-99}", "3 m"),
    ("\\boxed{" + "9" * 490 + "}", "3"), ("\\boxed{nan}", "3"), ("\\boxed{3 or 4}", "3"),
    ("Answer: 3 4 5", "3"), ("\\boxed{5314}", "5313"), ("\\boxed{4/3}", "3/4"), ("\\boxed{3/0}", "3"),
    ("\\boxed{-3/4}", "3/4"), ("\\boxed{2\\frac{1}{2}}", "10.5"), ("\\boxed{\\frac{1}{2}5}", "0.04"),
    ("\\boxed{10²}", "102"), ("4 m/s", "v = 3 m/s"), ("\\boxed{41 = 3}", "3")])
def test_wrong_quantities(response: str, answer: str) -> None:
    assert not is_right(response, answer)


def test_integers_may_be_compared_with_a_tolerance() -> None:
    row = {"response": "\\boxed{5314}", "answer": "5313"}
    assert Stem(exact_integers=False).score(row).reward == 1.0


def test_a_unit_may_be_required() -> None:
    assert not is_right("\\boxed{3}", "3 m", unit_required=True)
    assert is_right("\\boxed{300 cm}", "3 m", unit_required=True)


@pytest.mark.each(("text", "value"), [
    ("12", 12), ("1,000", 1000), (".5", 0.5), ("5 min", 300), ("25%", 0.25), ("3e-2 km", 30),
    ("x", None), ("", None), ("1" * 401, None)])
def test_quantities_convert_to_si_units(text: str, value: float | None) -> None:
    quantity = read_quantity(text)
    if value is None:
        assert quantity is None
    else:
        assert quantity is not None and math.isclose(quantity.value, value)


def test_short_answers_are_normalized() -> None:
    assert is_right("The answer is **the Mitochondrion**.", "mitochondrion")
    assert is_right("\\boxed{\\text{NaCl}}", "NaCl")
    assert is_right("정답은 엽록체", ["미토콘드리아", "엽록체"])
    assert not is_right("The answer is chloroplast", "mitochondrion")
    assert normalize_answer(" The  Ｗater. ") == "water"


@pytest.mark.each("answer", [None, 4, "", [], ["a", 1]])
def test_rows_without_an_answer_are_refused(answer: object) -> None:
    with pytest.raises(Refused, match="must be text, or a list"):
        Stem().score({"response": "x", "answer": answer})


@pytest.mark.each("text", [
    "\\boxed{" * 50_000, "answer is " * 50_000, "<answer>" * 50_000, "{" * 500_000, "a" * 1_000_000,
    "정답" * 100_000])
def test_hostile_responses_are_fast(text: str) -> None:
    assert not is_right(text, "B")
    assert not is_right(text, "3 m/s")


def test_last_complete_box_counts() -> None:
    assert extract_last_box("\\boxed{1} \\boxed{\\frac{2}{3}} \\boxed{open") == "\\frac{2}{3}"
    assert extract_final_answer("\\boxed{1}\nthe answer is 2") == "1"
    assert extract_final_answer("x " * 100) is None

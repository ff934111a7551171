"""Reward `math`: verdicts equal those of math-verify, and hostile answers only affect their row."""

import sys
from itertools import product
from pathlib import Path

import pytest

from megatron_sov.judge.rewards.math_answers import Math
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.rewards.scoring import create_runner

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from math_verdicts import FOOLING, HONEST

pytest.importorskip("math_verify", reason="the extra `rl` is not installed")

GOLDS = ["42", "$\\frac{1}{2}$", "$3\\sqrt{2}$", "$x^2+2x+1$", "$(1,2)$", "$\\{1,2,3\\}$", "$-7$", "$0.125$",
         "$\\frac{\\pi}{4}$", "$[0,1)$", "$1,234$", "$x=3$", "$\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}$"]
RESPONSES = [
    "so \\boxed{42}", "The answer is 42.", "$0.5$", "\\boxed{1/2}", "$\\frac{2}{4}$", "$\\sqrt{18}$",
    "$3\\cdot\\sqrt2$", "$(x+1)^2$", "$(1, 2)$", "(2,1)", "$\\{3,2,1\\}$", "\\boxed{-7}", "7", "$\\frac18$",
    "12.5%", "$\\pi/4$", "$0.785398$", "$[0,1]$", "$[0,1)$", "1234", "$x = 3$", "3",
    "$\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}$", "", "I do not know", "\\boxed{}", "$\\frac{1}{0}$",
    "\\boxed{42.0}", "\\boxed{4.2\\times10^1}", "\\boxed{\\dfrac{1}{2}}", "x + 1 = 43, so \\boxed{x = 42}",
    "\\boxed{1{,}234}", "\\boxed{-7\\text{ m}}"]


@pytest.mark.deep
def test_verdicts_equal_math_verify() -> None:
    from math_verify import parse, verify

    pairs = list(product(GOLDS, RESPONSES))[::2]  # an odd number of responses: each meets every other gold
    golds = {gold: parse(gold if "$" in gold else f"\\boxed{{{gold}}}") for gold in GOLDS}
    answers = {response: parse(response) for response in RESPONSES}
    expected = [verify(golds[gold], answers[response]) for gold, response in pairs]
    request = request_reward("math", {})
    with create_runner(request, build_versioned_reward(request), 2) as running:
        results = running.score([{"answer": gold, "response": response} for gold, response in pairs])
    assert len(pairs) > 200
    assert [pair for pair, result, verdict in zip(pairs, results, expected, strict=True)
            if (result.status, result.reward) != ("scored", float(verdict))] == []
    assert 5 <= sum(expected) < 50


@pytest.mark.parametrize(("items", "reward"), [(FOOLING, 0.0), (HONEST, 1.0)], ids=["fooling", "honest"])
def test_benchmark_attacks_fail_and_honest_answers_pass(items: list[tuple[str, str]], reward: float) -> None:
    request = request_reward("math", {})
    assert len(items) == len(set(items)) == 44
    with create_runner(request, build_versioned_reward(request), 1) as running:
        results = running.score([{"answer": gold, "response": response} for gold, response in items])
    assert [item for item, result in zip(items, results, strict=True) if result.reward != reward] == []


@pytest.mark.each(("answer", "response"), [
    ("3\\sqrt{2}", "$3\\sqrt{2}$"), ("(1,2)", "the pair $(1,2)$"), ("\\frac{1}{2}", "1/2"),
    ("x^2+1", "$1+x^2$")])
def test_answer_without_dollars_is_parsed(answer: str, response: str) -> None:
    assert Math().score({"answer": answer, "response": response}).reward == 1.0
    assert Math().score({"answer": answer, "response": "3"}).reward == 0.0


def test_adjacent_boxes_are_separate_numbers() -> None:
    """Joined by commas, as math-verify joins them, 20 and 204 would be read as 20,204."""
    for boxes in ("\\boxed{20} and \\boxed{204}", "\\boxed{ 20 }, \\boxed { 204}"):
        for answer, reward in (("\\{20, 204\\}", 1.0), ("20204", 0.0), ("204", 0.0)):
            assert Math().score({"answer": answer, "response": boxes}).reward == reward
    assert Math().score({"answer": "20204", "response": "\\boxed{20,204}"}).reward == 1.0
    corrected = "First $\\boxed{20}$; no, $\\boxed{204}$"
    assert Math().score({"answer": "204", "response": corrected}).reward == 1.0


@pytest.mark.each(("response", "reward", "reward_if_marked"), [
    ("There are 42 cases here and nobody has the time to go through all of them", 1.0, 0.0),
    ("Nobody has the time to go through all of them. The answer is 42.", 1.0, 1.0), ("\\boxed{42}", 1.0, 1.0),
    ("\\boxed{41}", 0.0, 0.0), ("It is somewhere between 1 and 42", 1.0, 0.0), ("So\n42", 1.0, 1.0),
    ("It is between $1$ and $42$", 0.0, 0.0), ("So it must be $42$", 1.0, 1.0), ("정답은 42", 1.0, 1.0),
    ("<answer>42</answer>", 0.0, 1.0), ("**The answer is: 42**", 1.0, 1.0),
    ("The answer is unclear", 0.0, 0.0)])
def test_unmarked_numbers_are_not_answers(response: str, reward: float, reward_if_marked: float) -> None:
    row = {"answer": "42", "response": response}
    assert Math(marked_only=False).score(row).reward == reward
    assert Math().score(row).reward == reward_if_marked


@pytest.mark.each("row", [
    {"response": "1"}, {"response": "1", "answer": ""}, {"response": "1", "answer": "$$"},
    {"response": "1", "answer": 4}, {"response": "1", "answer": "9" * 10_001}])
def test_a_row_without_a_readable_answer_is_refused(row: dict) -> None:
    with pytest.raises(Refused):
        Math().score(row)


NUMBERS = [
    ("42", "42.0"), ("42", "+42"), ("42", "x=42"), ("42", "n_1 = 42"), ("42", "f(3)=42"),
    ("42", "6\\times 7=42"), ("42", "42\\%"), ("0.42", "42\\%"), ("42\\%", "42\\%"),
    ("42", "42\\text{ cm}^2"), ("42", "\\$42"), ("42", "42^\\circ"), ("42", "\\text{42}"),
    ("42", "\\left(42\\right)"), ("42", "\\{42\\}"), ("42", "x \\in \\{42\\}"), ("42", "\\approx 42"),
    ("42000", "42 \\times 10^3"), ("42000", "4.2 \\cdot 10^{4}"), ("100000", "10^5"),
    ("1234.5", "1{,}234.50"), ("1.5", "1\\frac{1}{2}"), ("1.5", "\\dfrac32"), ("-1.5", "-\\frac{3}{2}"),
    ("-1.5", "\\frac{-3}{2}"), ("1.5", "3/2"), ("\\frac{84}{2}", "42"), ("2^{20}", "1048576"),
    ("3\\sqrt{2}", "\\sqrt{18}"), ("x=42", "42"), (".5", "\\frac12"),
    ("-42", "\u221242"), ("42", "42°"), ("42", "\uff14\uff12"), ("-.5", "\\frac{1}{-2}"), ("7", "|S|=7"),
    ("7", "m+n=3+4=7"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}")]
"""Gold answers, and boxed answers that spell the same number in another way."""


# The rewards for the gold answers "4" and "\\{3, 4\\}".
@pytest.mark.each(("boxes", "reward_of_4", "reward_of_both"), [
    ("\\boxed{3}, no wait \\boxed{4}", 1.0, 0.0), ("\\boxed{3}\n\n\\boxed{4}", 1.0, 1.0),
    ("\\boxed{3}" + " and so on" * 30 + " \\boxed{4}", 1.0, 0.0), ("\\boxed{3}\\boxed{4}", 1.0, 1.0),
    ("\\boxed{3}, \\boxed{4} (as asked, in \\boxed{})", 0.0, 1.0), ("\\boxed{3} and \\boxed{4}", 0.0, 1.0)])
def test_last_boxes_form_the_answer(boxes: str, reward_of_4: float, reward_of_both: float) -> None:
    for answer, reward in (("4", reward_of_4), ("3", 0.0), ("\\{3, 4\\}", reward_of_both)):
        assert Math().score({"answer": answer, "response": boxes}).reward == reward


HOSTILE = ["10**10**10", "$10^{10^{10}}$", "\\boxed{" + "(" * 500 + "1" + ")" * 500 + "}", "9" * 100_000,
           "\\boxed{" * 2000, "$" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "$", "\u202e\\boxed{24}\u202c",
           "a" * 3_000_000, "\x00\x1b[31m\\boxed{1}", "\\boxed{1000000000!}",
           "$\\sum_{k=1}^{10^{12}} k^{99}$", "\ud800"]


def test_hostile_answers_score_0() -> None:
    rows = [{"answer": "42", "response": text} for text in [*HOSTILE, "\\boxed{42}"]]
    request = request_reward("math", {"cpu_limit_s": 1.0})
    with create_runner(request, build_versioned_reward(request), 2) as running:
        *results, honest = running.score(rows)
        (hostile_gold,) = running.score([{"answer": "1000000000!", "response": "\\boxed{42}"}])
    assert honest.reward == 1.0
    assert [(row["response"][:30], result) for row, result in zip(rows, results, strict=False)
            if result.reward != 0.0] == []
    assert (hostile_gold.status, hostile_gold.reward) == ("timeout", None), "the response did not cause it"


def test_libraries_are_part_of_the_version() -> None:
    versions = {build_versioned_reward(request_reward("math", settings)).version
                for settings in ({}, {"float_rounding": 3})}
    assert len(versions) == 2
    assert set(Math.LIBRARIES) >= {"math-verify", "sympy"}


@pytest.mark.each(("answer", "response", "reward"), [
    # restated questions are not answers
    ("80779853376", "\\boxed{123456 \\times 654321}", 0), ("1048576", "\\boxed{2^{20}}", 0),
    ("42", "\\boxed{17+25}", 0), ("\\frac{1}{3}", "\\boxed{\\int_0^1 x^2 dx}", 0),
    ("5050", "\\boxed{\\sum_{k=1}^{100} k}", 0), ("120", "\\boxed{\\binom{10}{3}}", 0),
    ("12", "\\boxed{\\gcd(48,36)}", 0), ("42", "\\boxed{\\frac{84}{2}}", 0), ("24", "\\boxed{4!}", 0),
    ("42", "\\boxed{\\sqrt{1764}}", 0), ("42", "The answer is 6*7", 0), ("x=42", "\\boxed{x=17+25}", 0),
    ("42", "Answer: $6 \\cdot 7$", 0), ("42", "\\boxed{41=42}", 0), ("42", "\\boxed{x=41=42}", 0),
    ("7", "\\boxed{a+b=3+5=7}", 0), ("7", "\\boxed{n=6 n=7}", 0), ("7", "\\boxed{a=6, b=7}", 0),
    ("3", "\\boxed{\\frac{6}{-2}}", 0),
    ("0.5", "\\boxed{2^{-1}}", 0), ("\\frac{\\pi}{4}", "\\boxed{\\int_0^1 \\frac{1}{1+x^2} dx}", 0),
    # small numbers, which rounding to decimals would make 0
    ("1.6 \\times 10^{-19}", "\\boxed{9.1 \\times 10^{-31}}", 0), ("0.0000005", "\\boxed{0.0000001}", 0),
    ("1.6 \\times 10^{-19}", "\\boxed{1.60e-19}", 1), ("0.0000005", "\\boxed{5 \\times 10^{-7}}", 1),
    ("0", "\\boxed{10^{-8}}", 0), ("0", "\\boxed{0.0}", 1),
    # several numbers, or a number that is revoked
    ("42", "So 41, 42", 0), ("42", "<answer>40 41 42</answer>", 0), ("42", "$41$ $42$", 0),
    ("42", "The answer is 42. No, 43.", 0), ("42", "The answer is 42 (not sure, could be 43)", 0),
    ("42", "The answer is 42. Wait, let me see: 6 * 7 = 42", 1), ("\\{41, 42\\}", "\\boxed{41, 42}", 1),
    ("42", "The answer is 42. No other number from 1 to 100 works.", 1),
    ("1000000", "The answer is 1 000 000", 1),
    ("42", "\\boxed{\\lt 42}", 0), ("42", "\\boxed{\\propto 42}", 0),
    ("5 km", "\\boxed{5 \\text{ miles}}", 0), ("5 miles", "\\boxed{5 \\text{ mi}}", 1),
    ("30^\\circ", "\\boxed{30 \\text{ radians}}", 0),
    # formatting commands around the number
    ("42", "\\boxed{\\boldsymbol{42}}", 1), ("42", "\\boxed{\\textcolor{red}{42}}", 1),
    ("42", "\\boxed{\\color{red}42}", 1), ("42", "\\boxed{\\,42~\\text{m}}", 1),
    ("1000000", "\\boxed{1\\ 000\\ 000}", 1), ("5 km", "\\boxed{\\(5 \\text{ m}\\)}", 0),
    ("42", "\\boxed{\\[ x = 42 \\]}", 1), ("42", "\\boxed{\\(42\\) million}", 0),
    # a set is neither a tuple nor an interval
    ("(4,3)", "$\\left\\{4,3\\right\\}$", 0), ("(0,1)", "\\boxed{\\{0,1\\}}", 0),
    ("(4,3)", "\\boxed{(x,y)=(4,3)}", 1), ("\\{1,2\\}", "\\boxed{S=\\{2,1\\}}", 1),
    # a multiplier is no unit
    ("42", "The answer is 42 million.", 0.0), ("42", "\\boxed{42\\text{ thousand}}", 0.0),
    ("42", "The answer is 42 squared", 0.0), ("42", "The answer is $42x$.", 0.0),
    ("42", "The answer is 42 square centimeters.", 1.0),
    ("42", "The answer is 42 zebras.", 1.0), ("42x", "The answer is $42x$.", 1.0),
    ("xy^2", "The answer is $y^2x$.", 1.0), ("x", "The answer is $x$.", 1.0),
    # another unit is another answer
    ("5 km", "\\boxed{5 m}", 0), ("$5\\text{ km}$", "The answer is 5 m.", 0),
    ("5 cm", "\\boxed{5\\ \\text{cm}^2}", 0),
    ("90^\\circ", "\\boxed{90 \\text{ rad}}", 0), ("5 km", "\\boxed{5\\,\\mathrm{km}}", 1),
    ("5 km", "\\boxed{5}", 1), ("5", "\\boxed{5 \\text{ km}}", 1),
    ("5 km", "\\boxed{5\\text{ kilometers}}", 1),
    ("3 \\text{ apples}", "\\boxed{3 \\text{ m}}", 1), ("90^\\circ", "\\boxed{90°}", 1),
    # mixed numbers, counters and exponents are read as written
    ("7/2", "\\boxed{3 1/2}", 1.0), ("\\frac{7}{2}", "The answer is $3 1/2$.", 1.0),
    ("-7/2", "\\boxed{-3 1/2}", 1.0), ("31/2", "\\boxed{3 1/2}", 0.0), ("3/2", "\\boxed{3 1/2}", 0.0),
    ("7/2", "\\boxed{3, 1/2}", 0.0), ("7/2", "\\boxed{2 3/2}", 0.0), ("7/2", "\\boxed{1 3 1/2}", 0.0),
    ("5", "\\boxed{5개}", 1.0), ("5", "답은 \\boxed{5 명}", 1.0), ("5", "\\boxed{5개, 6개}", 0.0),
    ("5", "\\boxed{5개월}", 0.0), ("5개", "\\boxed{5명}", 0.0), ("6", "\\boxed{5개}", 0.0),
    ("6.02\\times 10^{23}", "\\boxed{6.02e23}", 1.0), ("6.02\\times 10^{22}", "\\boxed{6.02e23}", 0.0),
    ("2e", "\\boxed{2e1}", 0.0),
    # announced answers are parsed completely
    ("73", "Therefore\n\n$$\n73\n$$", 1), ("73", "Therefore\n\n\\[\n73\n\\]", 1), ("74", "So\n$$\n73\n$$", 0),
    ("73", "The answer is\n$$\n73\n$$", 1), ("73", "The answer is:\n\n\\[ x = 73 \\]\nas was wanted", 1),
    ("73", "$$73 = 70 + 3$$\nand so on, as far as anybody has the patience to go with it", 0),
    ("\\dfrac{\\pi}{2}", "The answer is pi/2.", 1), ("2", "The answer is pi/2.", 0),
    ("14 - i", "The answer is 14 - i.", 1), ("14", "The answer is 14 - i.", 0),
    ("14", "The answer is 14 - which is even.", 1), ("3", "The answer is 3 + 4i", 0),
    ("x^2+1", "The answer is x^2 + 1.", 1), ("2\\sqrt{3}", "The answer is 2*sqrt(3).", 1),
    ("(3,4)", "The answer is (3, 4).", 1), ("[0,1)", "The answer is [0, 1).", 1),
    ("5", "The answer is x = 5.", 1), ("9.8 m/s^2", "The answer is 9.8 m/s^2.", 1),
    ("12 cm", "The answer is 12\\text{ cm}.", 1), ("6", "The answer is 6 \\text{ or } 7.", 0),
    ("x>3", "**Answer:** x > 3", 1), ("x=3", "The answer is 3\\sqrt{2}.", 0),
    ("a+b", "The answer is b+a.", 1),
    ("60 km/h", "The answer is 60 km/h.", 1), ("3", "The answer is x > 3.", 0),
    ("12", "The answer is 5 + 7 = 12.", 1), ("42", "The answer is 42, a number.", 1),
    ("42", "The answer is 42!", 1), ("42", "The answer is 42 (see above).", 1),
    ("\\text{Monday}", "The answer is Monday.", 1), ("서울", "정답은 서울", 1),
    # boxes in thinking are ignored
    ("42", "<think>\\boxed{42}</think> The answer is 41.", 0.0),
    ("42", "<think>\\boxed{41}</think> The answer is 42.", 1.0),
    ("42", "<think>\\boxed{42}</think> I do not know.", 0.0), ("42", "\\boxed{41}</think>\\boxed{42}", 1.0)])
def test_attacks_and_honest_answers(answer: str, response: str, reward: float) -> None:
    assert Math().score({"answer": answer, "response": response}).reward == reward


COLUMN = "\\begin{pmatrix} -2 \\\\ 1 \\end{pmatrix}"
MATRIX = "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"
BOXED = [
    # matrices and vectors are not their last number
    (COLUMN, COLUMN, 1), (COLUMN, "1", 0), (COLUMN, "\\begin{bmatrix} -2\\\\1 \\end{bmatrix}", 1),
    (COLUMN, "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", 0),
    (COLUMN, "\\begin{pmatrix} -2 & 1\\end{pmatrix}", 0),
    (MATRIX, MATRIX, 1), (MATRIX, "4", 0), ("\\begin{pmatrix} 5 & 1 \\\\ 0 & 2 \\end{pmatrix}", "2", 0),
    ("\\left( \\begin{array}{c} 1 \\\\ 2 \\end{array} \\right)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1),
    ("\\langle 1, 2, 3 \\rangle", "(1,2,3)", 1), ("\\langle 1, 2, 3 \\rangle", "3", 0),
    ("\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}", "-2", 1), ("$" + MATRIX + "$", MATRIX, 1),
    ("3", "\\begin{cases} x=1 \\\\ y=3 \\end{cases}", 0), ("3", "x \\equiv 3 \\pmod 7", 0),
    # equations
    ("2x+4y-3=0", "2x+4y=3", 1), ("2x+4y-3=0", "y=-\\frac12x+\\frac34", 1), ("2x+4y-3=0", "0", 0),
    ("x^2+y^2=25", "x^2+y^2-25=0", 1), ("x^2+y^2=25", "2x^2+2y^2=50", 1), ("x^2+y^2=25", "x+y=25", 0),
    ("x^2+y^2=25", "25", 0), ("x^2+y^2=25", "0=0", 0), ("x+y=5", "y=5-x", 1), ("x+y=5", "5", 0),
    ("y=2x+1", "2x+1", 1), ("y=2x+1", "y=2x+2", 0), ("x = 3", "3", 1), ("x = 3", "y = 3", 0),
    ("f(3)=42", "42", 1), ("f(3)=42", "f(3)=42", 1), ("|S| = 7", "7", 1), ("x=42", "6\\cdot 7", 0),
    # intervals and sets
    ("(0,1)", "[0,1]", 0), ("(-\\infty,3]", "(-\\infty, 3]", 1), ("\\{1,2\\}", "2,1", 1),
    ("\\{1,2\\}", "1", 0),
    ("\\emptyset", "\\varnothing", 1), ("\\lbrace 1,2 \\rbrace", "\\{2,1\\}", 1), ("1 and 2", "2, 1", 1),
    # words
    ("Monday", "\\text{Monday}", 1), ("\\text{Monday}", "monday", 1), ("\\text{Monday}", "Domany", 0),
    ("\\text{east}", "seat", 0), ("\\text{no solution}", "\\text{No solution}", 1), ("yes", "\\text{Yes}", 1),
    ("no", "on", 0), ("no", "No", 1), ("odd", "dod", 0), ("xy", "yx", 1),
    ("\\text{June 20}", "June 20", 1), ("\\text{(B)}", "B", 1), ("B", "C", 0), ("서울", "서울", 1),
    ("서울", "부산", 0), ("\\text{A, B}", "A, B", 1),
    ("ACB", "ABC", 0), ("ACB", "ACB", 1), ("ACB", "\\text{ACB}", 1), ("ABD", "A, B, D", 1), ("ABD", "AB", 0),
    # units, counters, percentages
    ("5개", "5", 1), ("5개", "5개", 1), ("5개", "5명", 0), ("5개", "6", 0), ("5 dollars", "\\$5", 1),
    ("5 dollars", "5 dollars", 1), ("5 cm^2", "5", 1), ("5 cm^2", "5 \\text{ cm}^2", 1),
    ("5 cm^2", "5 cm", 0),
    ("9.8 m/s^2", "9.8", 1), ("\\text{12 cm}", "12", 1), ("50%", "50", 1), ("50\\%", "0.5", 1),
    ("50 percent", "50\\%", 1), ("50%", "5\\%", 0),
    # bases
    ("101_2", "101_{2}", 1), ("101_2", "101_3", 0), ("101_2", "101", 1), ("1101_{12}", "1101_{2}", 0),
    # spellings
    ("1 000", "1000", 1), ("1 000", "0", 0), ("1000", "1 000", 1), ("infinity", "\\infty", 1),
    ("∞", "\\infty", 1),
    ("sin(x)", "\\sin x", 1), ("2pi", "2\\pi", 1), ("pi/2", "\\frac{\\pi}{2}", 1),
    ("2 sqrt(3)", "2\\sqrt{3}", 1),
    ("x²", "x^2", 1), ("1½", "1.5", 1), ("\\mathbf{42}", "42", 1), ("42.", "42", 1),
    ("\\approx 3.14", "3.14", 1),
    ("The final answer is \\boxed{42}", "42", 1), ("$3$ and $4$", "4, 3", 1)]
"""Gold answers, boxed answers of responses, and whether these are right."""


@pytest.mark.each(("answer", "given", "reward"), [
    *BOXED, *((answer, given, 1) for answer, given in NUMBERS),
    *((answer, answer, 1) for answer, _, _ in BOXED if "boxed" not in answer and "$" not in answer)])
def test_gold_answers_are_parsed_completely(answer: str, given: str, reward: float) -> None:
    assert Math().score({"answer": answer, "response": f"So \\boxed{{{given}}}."}).reward == reward


@pytest.mark.each("answer", [
    "\\begin{cases} x+1 & x>0 \\\\ 0 & x \\le 0 \\end{cases}", "x \\equiv 3 \\pmod{7}", "A \\cap B",
    "2k\\pi, k \\in \\mathbb{Z}", "0.333...", "1 + 2 + \\cdots + n", "\\{x \\mid x > 3\\}", "0.\\overline{3}",
    "11:30 \\text{ a.m.}", "x=3 \\text{ if } y=2", "(A) 5", "5 million", "5 \\text{ million}", "about 3",
    "2/3 of the cake", "The total is 42 apples", "정답은 42", "5시간", "#### 42", "$x$ is $3$", "-", "?"])
def test_partially_parsed_gold_answers_are_refused(answer: str) -> None:
    for response in (f"\\boxed{{{answer}}}", "\\boxed{3}", "\\boxed{42}", ""):
        with pytest.raises(Refused, match=r"answer = .*a gold answer has to be one value in LaTeX, or words"):
            Math().score({"answer": answer, "response": response})

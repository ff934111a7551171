"""Generator `probes`: problems whose answers solutions and a program find as well, and no benchmark has."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import generator, samples_of, wrongly_judged
from synthesis.actors import probes

from data_prep.synth.generator import GeneratorItem, NoReply, Reply
from data_prep.synth.generators.probes import ProbesSettings, read_problem, run_program
from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.program import Outcome


def test_planted_cases_are_told_apart() -> None:
    assert wrongly_judged("probes") == []


def test_without_input_all_four_subdomains_are_asked_for() -> None:
    items = list(generator("probes", per_topic=2).items([]))
    assert {item.fields["domain"] for item in items} == {"algebra", "geometry", "calculus", "statistics"}
    assert len(items) == len({item.id for item in items}) == 2 * 40
    more = list(generator("probes", per_topic=3).items([]))
    assert {item.id for item in items} < {item.id for item in more}


@pytest.mark.parametrize(("text", "found"), [
    ("Problem: What is two and two, if not five?\nAnswer: 4", "4"),
    ("**Problem:** What is two and two, if not five?\n\n**Answer:** $\\boxed{4}$", "4"),
    ("Problem: Find x\nwith x + 1 = 5 and x - 1 = 3.\nAnswer: $x = 4$.", "x = 4"),
    ("Problem: too short\nAnswer: 4", None), ("What is two and two? 4", None),
    ("Problem: What is two and two, if not five?\nAnswer:", None),
])
def test_a_problem_is_read_in_its_form_alone(text: str, found: str | None) -> None:
    _, answer, why = read_problem(Reply(text))
    assert (None if why else answer) == found


@pytest.mark.parametrize(("program", "printed"), [
    ("print(3 * 4)", "12"), ("print(1)\nprint(2)", ""), ("1/0", ""), ("open('/etc/passwd')", ""),
    ("import socket", ""), ("print('x' * 1000)", ""),
    ("from fractions import Fraction\nprint(Fraction(6, 8))", "3/4")])
def test_a_program_says_one_line_and_reaches_for_nothing(program: str, printed: str) -> None:
    assert run_program(program) == printed


@pytest.mark.parametrize(("status", "is_known"), [("infrastructure", False), ("timeout", True)])
def test_a_program_that_had_no_processor_is_run_again(monkeypatch: pytest.MonkeyPatch, status: Any,
                                                      is_known: bool) -> None:
    outcome = Outcome(status, None, "", "", "the machine is too busy", 630.0, 1.0, 600.0)
    monkeypatch.setattr("data_prep.synth.generators.probes._sandbox",
                        lambda: SimpleNamespace(run=lambda program, limits: outcome))
    with nullcontext() if is_known else pytest.raises(NoReply, match="the machine is too busy"):
        assert run_program("print(1)") == ""


@pytest.mark.parametrize(("line", "said"), [
    ('{"domain": "al gebra", "topic": "x"}', "domain = 'al gebra' must be a name"),
    ('{"domain": "algebra"}', "topic = None must be a text"),
])
def test_a_topic_has_a_domain(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(UserError, match=said):
        list(generator("probes").items([tmp_path / "t.jsonl"]))


def test_draws_of_no_use_do_not_agree_and_lose_no_problem() -> None:
    def replies(request: Any) -> Any:
        said = probes.reply(request)
        is_lost = "Python programs" in str(request["messages"]) or request["seed"] % 7 < 6
        return "" if is_lost and not str(said).startswith("Problem:") else said

    asked = GeneratorItem("x.1", {"domain": "algebra", "topic": "gardens", "number": 1})
    (sample,) = samples_of(generator("probes", min_agreement=0.1, num_solutions=9), asked, replies)
    assert sample.reason == "" and sample.notes["num_solutions"] == 9 > sample.notes["num_right"] > 0
    assert sample.notes["num_programs"] == 0


def test_settings_name_all_problems(tmp_path: Path) -> None:
    assert keys_of(ProbesSettings(num_solutions=1)) == ["num_solutions"]
    programs, benchmarks = problems_of(ProbesSettings(min_programs=2, benchmarks=(str(tmp_path / "none"),)))
    assert programs.key == "min_programs" and str(benchmarks).startswith("benchmarks:")

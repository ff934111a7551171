"""A scripted model for the generator `constraints`: it invents constraints, writes functions with cases, and
describes functions. A fault named in a constraint ("... (planted: never ends)") is committed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models.judge import is_request_to_judge, judge

SENTENCE = "골목에 대한 이야기입니다. 사람들은 이것을 오래전부터 알고 있었고 지금도 자주 찾습니다. "
"""Korean without digits, commas, quotation marks or line ends."""


@dataclass(frozen=True)
class Rule:
    """A constraint on the number of times that a word occurs."""

    min_count: int

    @property
    def text(self) -> str:
        return f'Use the word "이유" at least {self.min_count} times.'

    @property
    def expression(self) -> str:
        """Expression that the check function returns."""
        return f"response.count('이유') >= {self.min_count}"

    @property
    def description(self) -> str:
        """Description of the function by a model that reads it."""
        return f'The word "이유" must occur {self.min_count} times or more.'


RULES = {rule.text: rule for rule in map(Rule, (1, 2, 3))}
FAULTS = {
    "accepts everything": "True",
    "rejects everything": "False",
    "accepts all but blanks": "len(response.strip()) > 0",
    "never ends": "all(True for _ in iter(int, 1))",
    "reads a file": "open('/etc/passwd').read() != response",
    "reaches the network": "__import__('socket').create_connection(('127.0.0.1', 80)) is None",
    "gives no truth value": "response.find('x')",
    "does not parse": "response ==",
    "checks something else": "len(response) % 7 == 3",
    "is described as the contrary": "",
    "has contrary cases": "",
}
"""Fault -> expression of the check function; empty: the function is sound."""
_CONSTRAINT = re.compile(r"Instruction:\n(.*?)(?: \(planted: (.*?)\))?\n\nWrite a function", re.DOTALL)
_RULE_OF_FUNCTION = re.compile(r"^# rule: (.*?)(?: \(planted: (.*?)\))?$", re.MULTILINE)


def reply(request: Mapping[str, Any]) -> str:
    """Answer a request for constraints, a function, the description of a function, or a grade."""
    if is_request_to_judge(request):
        return judge(request, _grade_description)
    prompt = request["messages"][-1]["content"]
    if request_for_ideas := re.search(r"Write (\d+) different instructions", prompt):
        num_ideas = int(request_for_ideas[1]) - 1  # the seed of the item is an instruction too
        return "\n".join(["Sure:", *(f"- {text}" for text in list(RULES)[:num_ideas])])
    if constraint := _CONSTRAINT.search(prompt):
        return _write_function(RULES[constraint[1]], constraint[2] or "", request["seed"])
    rule = _RULE_OF_FUNCTION.search(prompt)
    if rule is None or rule[2] == "checks something else":
        return "Divided by seven, the number of characters leaves three."
    description = RULES[rule[1]].description
    is_contrary = rule[2] == "is described as the contrary"
    return f"Do the contrary of this: {description}" if is_contrary else description


def _grade_description(material: Mapping[str, str]) -> int:
    text = material["instruction"].partition(" (planted")[0]
    return 9 if material["what is checked"] == RULES[text].description else 1


def _write_function(rule: Rule, fault: str, seed: int) -> str:
    """Return a function and three cases, which differ for each seed."""
    planted = f" (planted: {fault})" if fault else ""
    source = (f"def evaluate(response):\n# rule: {rule.text}{planted}\n    # {seed}\n"
              f"    return {FAULTS.get(fault) or rule.expression}")
    text = f"{SENTENCE}{seed}"
    cases = [{"input": text + " 이유" * rule.min_count, "output": True},
             {"input": text + " 이유" * (rule.min_count - 1), "output": False},
             {"input": "도시 " + text, "output": "false"}]
    if fault == "has contrary cases":
        cases = [{**case, "output": case["output"] is not True} for case in cases]
    return f"```python\n{source}\n```\n```json\n{json.dumps(cases, ensure_ascii=False)}\n```"


def make_item(fault: str = "") -> GeneratorItem:
    """Return the item whose constraint has a fault, or is sound."""
    text = next(iter(RULES)) + (f" (planted: {fault})" if fault else "")
    fields = {"kind": "form", "seeds": f"- {text}", "number": 1}
    return GeneratorItem(f"case.{fault or 'sound'}", fields, "planted")

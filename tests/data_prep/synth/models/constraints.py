"""A scripted model for the generator `constraints`: it invents rules, writes functions with cases, and says
what functions ask for; where a fault is planted in a constraint it commits that fault."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from data_prep.synth.samples import GeneratorItem
from tests.data_prep.synth.models.cases import Case, asked as asked_of, grade, graded_in
from tests.data_prep.synth.models.rules import Rule, rules

RULES = {rule.text: rule for rule in rules()}
TOPIC = "골목"
FAULTS: Mapping[str, str] = {
    "accepts everything": "True",
    "rejects everything": "False",
    "accepts all but blanks": "len(response.strip()) > 0",
    "never ends": "all(True for _ in iter(int, 1))",
    "reads a file": "open('/etc/passwd').read() != response",
    "reaches the network": "__import__('socket').create_connection(('127.0.0.1', 80)) is None",
    "gives no truth value": "response.find('x')",
    "does not parse": "response ==",
    "checks something else": "len(response) % 7 == 3",
    "told back as the contrary": "",
    "cases that say the contrary": "",
}
"""What is wrong -> what the function returns, where that is what is wrong."""
_CONSTRAINT = re.compile(r"Instruction:\n(.*?)\n\nWrite a function", re.DOTALL)
_FUNCTION = re.compile(r"```python\n(.*?)\n```", re.DOTALL)
_RULE = re.compile(r"^# rule: (.*)$", re.MULTILINE)
_FAULT = re.compile(r" \(planted: (.*?)\)$")


def reply(request: Mapping[str, Any]) -> str:
    """Return what the model says to a request."""
    if graded := graded_in(request):
        constraint = _FAULT.sub("", graded.material["instruction"])
        same = constraint in RULES and graded.material["what is checked"] == RULES[constraint].back
        return grade(9 if same else 1, graded)
    _, asked = asked_of(request)
    if "different instructions" in asked:
        wanted = int(re.findall(r"Write (\d+) different", asked)[0])
        return "\n".join(["Sure:", *(f"- {text}" for text in list(RULES)[:wanted - 1])])
    if found := _CONSTRAINT.search(asked):
        return _check(found[1].strip(), request["seed"])
    source = _RULE.search(_FUNCTION.findall(asked)[0])
    return _told_back(source[1]) if source else "Say something."


def _told_back(constraint: str) -> str:
    fault = _FAULT.search(constraint)
    if fault and fault[1] == "checks something else":
        return "Divided by seven, the number of characters leaves three."
    back = RULES[_FAULT.sub("", constraint)].back
    return "Do the contrary of this: " + back if fault and "contrary" in fault[1] else back


def _check(constraint: str, seed: int) -> str:
    """Return a function of its own for each seed, with three cases."""
    fault = _FAULT.search(constraint)
    rule = RULES[_FAULT.sub("", constraint)]
    body = (FAULTS[fault[1]] if fault else "") or rule.body
    number = seed % 1_000_000
    cases = [{"input": rule.keeping(TOPIC, number), "output": True},
             {"input": rule.breaking(TOPIC, number), "output": False},
             {"input": rule.breaking("도시", number), "output": "false"}]
    if fault and fault[1] == "cases that say the contrary":
        cases = [{**case, "output": number_of_case > 0} for number_of_case, case in enumerate(cases)]
    source = f"def evaluate(response):\n    # rule: {constraint}\n    # {number}\n    return {body}"
    source = source.replace("    # rule", "# rule")  # at the beginning of its line
    return f"```python\n{source}\n```\n```json\n{json.dumps(cases, ensure_ascii=False)}\n```"


def cases() -> list[Case]:
    """Return a sound constraint, and one of each planted fault."""
    texts = list(RULES)
    return [Case(_item(texts[0]), reply, True, "a sound constraint"),
            *(Case(_item(f"{texts[7 * place % len(texts)]} (planted: {fault})"), reply, False, fault)
              for place, fault in enumerate(FAULTS))]


def _item(constraint: str) -> GeneratorItem:
    digest = hashlib.sha256(constraint.encode()).hexdigest()[:16]
    fields = {"kind": "form", "seeds": f"- {constraint}", "number": 1}
    return GeneratorItem(f"case.{digest}", fields, "planted")


def rule_of(constraint: str) -> Rule:
    """Return the rule of a constraint, by its words or by what its functions ask for."""
    return RULES.get(constraint) or next(rule for rule in RULES.values() if rule.back == constraint)

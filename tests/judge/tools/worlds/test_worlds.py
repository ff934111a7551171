"""Built-in worlds: their examples are solvable, states round-trip through JSON, and arithmetic is safe."""

import json
import time
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.judge.tools.worlds.calculator import evaluate_expression

SOLUTIONS: dict[str, list[tuple[list[tuple[str, dict[str, Any]]], str]]] = {
    "calculator": [([("calculate", {"expression": "17 * 23 + 2 ** 10"})], "The answer is 1415."),
                   ([("calculate", {"expression": "1/3 + 1/6"})], "The answer is 0.5")],
    "booking": [([("find_guest", {"email": "mina@example.com"}),
                  ("search_rooms", {"city": "Busan", "check_in": "2026-06-10", "check_out": "2026-06-12",
                                    "beds": 2}),
                  ("book_room", {"guest_id": "G1", "room_id": "R3", "check_in": "2026-06-10",
                                 "check_out": "2026-06-12"})], "Booked: $220 in all."),
                ([("cancel_booking", {"booking_id": "B1"})], "It is cancelled.")],
    "files": [([("search_text", {"text": "Helo"}),
                ("replace_text", {"path": "app/__init__.py", "old": "Helo", "new": "Hello"})], "Done"),
              ([("move_file", {"path": "notes.txt", "to": "NOTES.md"})], "Done")],
    "virtual": [([("find_books", {"title": "vegetarian"}),
                  ("borrow_book", {"member_id": "M1", "book_id": "B3", "due": "2026-06-30", "note": "soon"})],
                 "It is loan L2."),
                ([("return_book", {"loan_id": "L1"})], "Thank you.")],
}
"""World -> for each example, the tool calls (tool, arguments) and the final answer."""


def build_world(name: str, **settings: Any) -> Any:
    """Return the built-in world `name` with these settings."""
    return build_versioned_environment(request_environment(name, settings))[0]


@pytest.mark.each("name", SOLUTIONS)
def test_examples_are_solvable_but_not_by_inaction(name: str) -> None:
    world = build_world(name)
    for task, (calls, answer) in zip(world.EXAMPLES, SOLUTIONS[name], strict=True):
        world.reset(task)
        assert world.score("").reward == 0, world.score("")
        for tool, arguments in calls:
            world.call(tool, arguments)
        assert world.score(answer).reward == 1, world.score(answer)


@pytest.mark.each("name", SOLUTIONS)
def test_state_round_trips_through_json(name: str) -> None:
    world, other = build_world(name), build_world(name)
    calls, answer = SOLUTIONS[name][1]
    world.reset(world.EXAMPLES[1])
    first_state = world.snapshot()
    for tool, arguments in calls:
        world.call(tool, arguments)
    other.reset(world.EXAMPLES[1])
    other.restore(json.loads(json.dumps(world.snapshot())))
    assert other.snapshot() == world.snapshot() and other.score(answer).reward == 1
    world.reset(world.EXAMPLES[1])
    assert world.snapshot() == first_state == json.loads(json.dumps(first_state))


@pytest.mark.each("name, task, message", [
    ("calculator", {"question": "?"}, "has no 'answer'"), ("calculator", {"answer": "1"}, "no 'question'"),
    ("files", {"question": "?", "goal": {"files": {"a": 1}}}, "has no goal"),
    ("files", {"question": "?", "goal": {"files": {}}, "files": {"../a": ""}}, "which is no path")])
def test_invalid_tasks_are_refused(name: str, task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_world(name).reset(task)


@pytest.mark.each("path", ["", "/etc/passwd", "a//b", "../a", "a/..", "app", "notes.txt/a", "a\0b"])
def test_paths_stay_in_the_tree(path: str) -> None:
    files = build_world("files")
    files.reset(files.EXAMPLES[0])
    with pytest.raises(ToolFault):
        files.call("write_file", {"path": path, "text": ""})


@pytest.mark.each("expression, value", [
    ("2 ** 100", str(2 ** 100)), ("1/3 + 1/6", "1/2 = 0.5"), ("6 / 3", "2"), ("-7 // 2", "-4"),
    ("0.1 + 0.2", "0.30000000000000004"), ("sqrt(2) ** 2", "2.0000000000000004"), ("max(1, 2.5)", "2.5"),
    ("gcd(12, 18) + factorial(5)", "126"), ("round(2.567, 2)", "2.57"), ("(1/2) ** -3", "8"),
    ("2 ** 0.5", "1.4142135623730951"), ("round(pi, 4)", "3.1416")])
def test_values_of_expressions(expression: str, value: str) -> None:
    assert evaluate_expression(expression) == value


@pytest.mark.each("expression", [
    "", "1 +", "x", "1 if 2 else 3", "'a' * 9", "[1]", "().__class__", "__import__('os')", "True + 1", "1j",
    "9 ** 9 ** 9 ** 9", "2 ** -99999", "1 << 2", "factorial(10 ** 6)", "comb(10 ** 9, 10 ** 8)",
    "10 ** 400 * 1.0", "1e308 * 10",
    "1 / 0", "0 ** -1", "(-8) ** (1/3)", "sqrt(-1)", "exp(1000)", "round(5, -10 ** 9)",
    "(" * 300 + "1" + ")" * 300, "-" * 900 + "1", "1 +" * 900, "9" * 5000, "factorial(0.5)", "log()",
    "((10 ** 300) ** 4) ** 2", "min()", "abs(1, 2)", "sqrt(x=2)", "\0"])
def test_invalid_and_large_expressions_are_refused(expression: str) -> None:
    began_s = time.process_time()
    with pytest.raises(ToolFault) as caught:
        evaluate_expression(expression)
    assert caught.value.code == "refused" and time.process_time() - began_s < 0.5

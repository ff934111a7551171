"""A model's episode is read back as the chat that a script would have written."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import rl_tools

from megatron_sov.judge.tools.registry import make, order


def test_an_episode_that_a_model_plays_is_the_chat_of_its_script() -> None:
    world = make(order("calculator", {}))[0]
    goal = rl_tools.calculation(3, "times", 4, random.Random(0))
    script = next(chat for seed in range(100)
                  if len(chat := rl_tools.scripted(world, goal, random.Random(seed))["messages"]) == 5
                  and chat[3]["content"] == "12")
    turns = [f"<tool_call>{json.dumps(goal.call)}</tool_call>", script[-1]["content"]]
    assert rl_tools.played(world, {"task": goal.task}, turns) == {"messages": script,
                                                                  "tools": list(world.tools())}


def test_a_turn_with_text_behind_its_call_is_no_example() -> None:
    world = make(order("calculator", {}))[0]
    goal = rl_tools.calculation(3, "times", 4, random.Random(0))
    turns = [f"<tool_call>{json.dumps(goal.call)}</tool_call> so", "The answer is 12"]
    assert rl_tools.played(world, {"task": goal.task}, turns) is None

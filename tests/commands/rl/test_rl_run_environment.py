"""`megatron-sov rl run --environment`: a run plays the tasks of its rounds and learns from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.rollouts.store import RolloutStore
from tests.typed_words import format_set_options

TEMPLATE = (
    "{% if tools %}<|begin|>system<|content|>{{ messages[0].content }}{% for tool in tools %}"
    " {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}): "
    "{{ tool.function.description }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if not (tools and m.role == 'system') %}"
    "<|begin|>{{ m.role }}<|content|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}")
"""Chat template that names tools and arguments without types: prompts have 60 tokens instead of 300."""
WORLD = '''
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.environment import World
from megatron_sov.judge.tools.environment import tool

class Lucky(World):
    SYSTEM = "Be brief."
    EXAMPLES = ({"question": "?"},)

    @tool
    def look(self, where: str) -> str:
        """Look.

        Args:
            where: there.
        """
        return "nothing"

    def score(self, answer: str) -> Score:
        return Score(float(self.task["luck"]), {"said": answer or "nothing", "length": len(answer)})
'''
SETTINGS = ("rollout.rounds=2", "train.max_restarts=0", "rollout.prompts_per_round=2",
            "rollout.samples_per_prompt=2", "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=128",
            "policy.method=gspo", 'data.phases=[{"name": "main", "seq_len": 256}]',
            "train.eval_every_steps=0", "model.hidden_size=48", "policy.router_replay=true")


@pytest.mark.distributed
def test_a_run_plays_its_tasks_and_gets_rewards_from_the_environment(
        teacher: Path, tiny: list[str], run_command: Any, tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(teacher / "checkpoints/step-2", start)
    (start / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "world.py").write_text(WORLD)
    tasks = [{"question": f"{n}?", "luck": n} for n in range(2)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    command = ["rl", "run", "tiny-solar-open", *tiny, *format_set_options(SETTINGS), "--from",
             str(start), "--run", str(run), "--store", str(tmp_path / "store"), "--prompts",
             str(tmp_path / "tasks.jsonl"), "--reward", "environment", "--environment",
             f"{tmp_path / 'world.py'}:Lucky", "--limit", "max_turns=2"]
    refused = run_command(*command, "--limit", "max_turn_tokens=4000")
    assert refused.returncode == 2 and not run.exists(), refused.stderr
    assert ("= 12 and a turn's max_turn_tokens make 4140 tokens, but the model has a context of 4096"
            in refused.stderr)
    result = run_command(*command, "--limit", "max_turn_tokens=12", "--inject", "raise@save=1")
    assert "raise@save=1" in result.stderr, result.stderr
    store = RolloutStore.open(tmp_path / "store")
    (part,) = store.parts()
    rows = {row.key: row for row in store.read_rollouts(part.name)}
    assert len(rows) == 4
    for judged in store.read_rewards("environment", part.name):
        row = rows[judged.key]
        assert judged.reward == row.record["luck"] and len(row.tokens) <= 12
        # every token is replayed, including tool results
        assert row.routes is not None and len(row.routes) == len(row.prompt_tokens) + len(row.tokens) - 1
        assert row.routes.max() < 4, "there are four experts"
        # text among the components of a score is stored with the response, but is no component of the reward
        assert set(row.outcome["components"]) == {"said", "length"} and set(judged.components) == {"length"}
    means = read_manifest(run / "rounds/0001", "tokens").content["means"]
    assert means["responses"] == 4 and means["reward"] == 0.5 and set(means["components"]) == {"length"}
    changed = run_command(*command, "--limit", "max_turn_tokens=11", "--resume")
    assert changed.returncode == 2, changed.stderr
    assert "with limits.max_turn_tokens = 12, and the next round would be with 11" in changed.stderr

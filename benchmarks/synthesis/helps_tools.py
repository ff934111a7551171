"""What conversations with tools teach a small model, with the checks and without them.

    python benchmarks/synthesis/helps_tools.py --work FOLDER [--seeds 0 1 2] [--arms without kept unchecked]
    python benchmarks/synthesis/helps_tools.py --work FOLDER --print

A house is a virtual world: a task asks to switch one device of one room on or off.  The base model has seen
the form of such conversations, with rooms, devices and states by lot.  A scripted model then plays other
tasks four times each: in 35 % it does what is asked, in 40 % it says so without a call, in 25 % it switches
something in another room.  `sov-data synth tool-trajectories` keeps what reaches the goal.

  without    the base model
  kept       fine-tuned on what the run has kept
  unchecked  fine-tuned on as many of its conversations, whether they were kept or rejected

Measured is the share of goals that `tools run virtual` reaches at temperature 0.7 on pairs of room and device
that stood in no data.  Everything runs through the ordinary commands on one process of one thread; what is
complete is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from rl_tools import TOKENIZER
from seed_runs import ALWAYS, rows_of, run, run_arms, words, write
from synthesis.actors.shop_clerk import call
from synthesis.endpoint import MODEL as WRITER, ScriptedEndpoint, serving
from synthesis.helps import ARMS, Taught, report_shares, run_of

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.judge.tools.worlds.virtual import Virtual

ROOMS = ("kitchen", "hall", "attic", "cellar", "study", "garage", "nursery", "bath", "porch", "pantry")
DEVICES = ("lamp", "heater", "fan", "radio", "camera", "screen", "kettle", "blind")
NUM_BASE, NUM_ASKED, CONVERSATIONS = 400, 60, 4
RIGHT, CLAIMED = 0.35, 0.4
SETTINGS = (*ALWAYS, rows_of(256))
STEPS = {"base": 250, "sft": 200}
LR = {"base": 4e-3, "sft": 2e-3}
TEMPERATURE = 0.7
LIMITS = ("max_turns=3", "max_turn_tokens=72", "max_prompt_tokens=128", "max_response_tokens=128")
"""Of what a run plays; a call has up to 60 tokens, and one that is cut off reaches no goal."""
DONE = "It is done."
_PLACE = {"room": {"type": "string"}, "device": {"type": "string"}}


def house() -> dict[str, Any]:
    """Return the world."""
    pairs = [(room, device) for room in ROOMS for device in DEVICES]
    state = {"type": "string", "enum": ["on", "off", "unknown"]}
    where = "row.room == room and row.device == device"
    return {"name": "house", "rules": "Switch what is asked for.", "tables": {"switches": {
        "prefix": "S", "columns": {**_PLACE, "state": state},
        "rows": {f"S{i}": {"room": room, "device": device, "state": "unknown"}
                 for i, (room, device) in enumerate(pairs)}}},
        "tools": [{"name": "switch", "description": "Switch a device.", "parameters": {
            "type": "object", "properties": {**_PLACE, "state": {"type": "string", "enum": ["on", "off"]}},
            "required": ["room", "device", "state"]}, "returns": {"type": "string"},
            "does": [{"get": "switches", "where": where, "as": "found"},
                     {"update": "switches", "key": "found.id", "set": {"state": "state"}},
                     {"return": "'done'"}]}]}


def task(room: str, device: str, state: str) -> dict[str, Any]:
    """Return a task of the house."""
    return {"question": f"Switch the {device} in the {room} {state}.", "world": house(), "goal": {"calls": [
        {"name": "switch", "arguments": {"room": room, "device": device, "state": state}}], "answers": []}}


def reply(request: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the scripted model's turn, by the request's seed."""
    messages = request["messages"]
    if messages[-1]["role"] == "tool":
        return DONE
    device, room, state = re.findall(r"Switch the (\w+) in the (\w+) (\w+)\.", messages[-1]["content"])[0]
    drawn = random.Random(hashlib.sha256(f"{messages[-1]['content']} {request['seed']}".encode()).digest())
    share = drawn.random()
    if RIGHT <= share < RIGHT + CLAIMED:
        return DONE
    other = drawn.choice([one for one in ROOMS if one != room])
    return call("switch", {"room": room if share < RIGHT else other, "device": device, "state": state})


def by_lot(draw: random.Random) -> dict[str, Any]:
    """Return a conversation of the right form, whose call has nothing to do with its question."""
    def one() -> dict[str, str]:
        return {"room": draw.choice(ROOMS), "device": draw.choice(DEVICES),
                "state": draw.choice(("on", "off"))}

    asked = one()
    world = Virtual()
    seen = world.reset(task(**asked))
    messages = [{"role": "system", "content": seen.system}, {"role": "user", "content": seen.user}]
    if draw.random() < 0.5:
        messages += [{"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "switch", "arguments": one()}}]},
            {"role": "tool", "tool_call_id": "c", "content": "done"}]
    return {"messages": [*messages, {"role": "assistant", "content": DONE}], "tools": list(world.tools())}


class Seed(Taught):
    """Data and runs of one seed."""

    settings, steps, lr = SETTINGS, STEPS, LR

    def make_data(self) -> None:
        """Write tasks, have the scripted model play some, and pack, unless that is done."""
        if self.has_data:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(self.seed)
        found = [(room, device) for room in ROOMS for device in DEVICES]
        draw.shuffle(found)
        asked, learned = found[:NUM_ASKED // 2], found[NUM_ASKED // 2:]
        for name, pairs in (("asked", asked), ("tasks", learned)):
            write(self.folder / f"{name}.jsonl", (task(*pair, state) for pair in pairs
                                                  for state in ("on", "off")))
        write(self.folder / "base.jsonl", (by_lot(draw) for _ in range(NUM_BASE)))
        (self.folder / "checks.yaml").write_text("steps: []\n")
        os.environ["OPENAI_API_KEY"] = "sk-scripted"
        with serving(ScriptedEndpoint(reply)) as server:
            run(self.log, "data_prep.cli", "synth", "tool-trajectories", "--input",
                self.folder / "tasks.jsonl", "--engine", server.url, "--model", WRITER, "--output",
                self.folder / "made", "--workers", "1", "--checks", self.folder / "checks.yaml", "--threads",
                "2", *words(("user_share=0", f"conversations_per_task={CONVERSATIONS}")))
        self.write_arms(draw, "messages", "tools")
        (self.folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        self.pack("--preset", "custom", "--config", self.folder / "tokenizer.json", "--vocab-size", "400")

    def measure(self, name: str) -> None:
        """Have a run play the tasks that stood in no data."""
        output = self.folder / name / "episodes"
        if not (output / "manifest.json").exists():
            run(self.log, "megatron_sov", "tools", "run", "virtual", self.folder / name, "--tasks",
                self.folder / "asked.jsonl", "--output", output, "--concurrent", "20", "--temperature",
                str(TEMPERATURE), *(part for limit in LIMITS for part in ("--limit", limit)))


def arm(seed: int, work: Path, name: str) -> None:
    """Do what is not done of one arm."""
    Seed(seed, work).do(name)


def reached(folder: Path, name: str) -> float | None:
    """Return the percentage of goals reached, where it was measured."""
    output = folder / run_of(name) / "episodes"
    return 100 * read_manifest(output).content["mean_reward"] if output.exists() else None


def report(work: Path) -> None:
    """Print what there is."""
    report_shares(work, f"goals reached of {NUM_ASKED} tasks that stood in no data, at temperature "
                  f"{TEMPERATURE:g}, %", "conversations", ARMS, reached)


if __name__ == "__main__":
    run_arms(__doc__, ARMS, arm, report)

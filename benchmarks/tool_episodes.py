"""Fuzzed tool episodes: what a model sampled is trained, what tools say is not, and killed ones go on.

Usage: python benchmarks/tool_episodes.py [--episodes 1000] [--kills 1] > benchmarks/results/tool_episodes.txt

A script in the place of a model writes turns of every kind: calls, several at once, calls that are no JSON or
name no tool, texts that spell special tokens, tokens that no tokenizer would choose, turns without an end.
Each episode is held to what the script remembers having written and to the template written out by hand.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sov.chat.encode import ChatEncoder, TurnEncoder
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.episode import Episode, GeneratedTurn, lines_in, row_of
from megatron_sov.judge.tools.playing import EpisodeTable, ToolPolicy, play
from megatron_sov.judge.tools.registry import make, order
from megatron_sov.work.progress.journal import RECORDS, open_journal, work_folder

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (m.role == 'system' and tools) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORLDS = ("booking", "tickets", "files", "calculator")
LIMITS = EpisodeLimits(max_turns=6, max_tool_chars=300, max_response_tokens=1200, max_calls_per_turn=3)
CALLS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "booking": [("find_guest", {"email": "mina@example.com"}), ("cancel_booking", {"booking_id": "B1"}),
                ("search_rooms", {"city": "Seoul", "check_in": "2026-05-01", "check_out": "2026-05-04"}),
                ("book_room", {"guest_id": "G2", "room_id": "R2", "check_in": "2026-05-01",
                               "check_out": "2026-05-04"}), ("book_room", {"guest_id": "nobody"})],
    "tickets": [("find_tickets", {}), ("list_agents", {}), ("close_ticket", {"ticket_id": "T3", "note": END}),
                ("set_priority", {"ticket_id": "T2", "priority": 9}),
                ("assign_ticket", {"ticket_id": "T1", "agent_id": "A1"})],
    "files": [("list_files", {}), ("write_file", {"path": "a/b.txt", "text": f"{BEGIN}user\n말 {END}" * 20}),
              ("read_file", {"path": "a/b.txt"}), ("delete_file", {"path": "notes.txt"}),
              ("write_file", {"path": "../b", "text": ""})],
    "calculator": [("calculate", {"expression": "2 ** 100 / 3"}), ("calculate", {"expression": "1 / 0"}),
                   ("calculate", {"expression": 3})],
}


def chat_encoder() -> ChatEncoder:
    """Return an encoder of a small byte-level tokenizer and a template that shows tools."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ['<tool_call> {"name": "find_guest", "arguments": {"email": "the room"}} </tool_call>\n'] * 9,
        trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=[],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BEGIN, END)])
    return ChatEncoder(ChatTemplate(TEMPLATE, "", END, "the benchmark's tokenizer"), tokenizer)


class FuzzedPolicy:
    """Writes turns of every kind; which one follows from the stream alone."""

    def __init__(self, world: str, encoder: ChatEncoder, end_id: int, seed: int = 0) -> None:
        self._calls, self.encoder, self._end_id, self._seed = CALLS[world], encoder, end_id, seed
        self._vocab_size = end_id + 1
        self.seen: dict[int, tuple[list[int], list[int]]] = {}
        """Stream -> prompt, and what was written behind it."""

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        """Write the next turns."""
        found = []
        for prompt, stream in zip(prompts, streams, strict=True):
            ids = self._turn(random.Random(self._seed << 40 | stream))[:max_new_tokens]
            self.seen[stream] = (list(prompt), ids)
            found.append(GeneratedTurn(ids, [-0.5] * len(ids)))
        return found

    def _turn(self, rng: random.Random) -> list[int]:
        kind = rng.choice(["call"] * 6 + ["calls"] * 2 + [
            "json", "unknown", "tokens", "spelled", "odd", "odd", "endless", "answer", "answer"])
        if kind == "tokens":
            return [rng.randrange(self._vocab_size) for _ in range(rng.randrange(1, 40))]
        if kind == "answer":
            text = rng.choice(["It costs 220.", "Done: T1, T2, T3", "", "The answer is 1415."])
        elif kind == "json":
            text = "<tool_call>" + rng.choice(["{", "{}", "[1]", '{"name": 1', "NaN"])
            text += rng.choice(["", "</tool_call>", "</tool_call>"])
        elif kind == "unknown":
            text = self._call("delete_everything", {"sure": True})
        elif kind == "spelled":
            text = f"I write {END}\n{BEGIN}user\nmyself. " + self._call(*rng.choice(self._calls))
            return [*self.encoder._plain_ids(text), self._end_id]
        else:
            times = rng.randrange(2, 6) if kind == "calls" else 1
            text = "So. " + "\n".join(self._call(*rng.choice(self._calls)) for _ in range(times))
        ids = self.encoder.encode_text(text)
        if kind == "odd":  # one token for each byte: no tokenizer would write it so
            ids = [i for char in text for i in self.encoder.encode_text(char)]
        return ids if kind == "endless" else [*ids, self._end_id]

    @staticmethod
    def _call(name: str, arguments: dict[str, Any]) -> str:
        return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def problems_of(episode: Episode, policy: FuzzedPolicy) -> list[str]:
    """Return what is wrong with the tokens of an episode."""
    found, ids, encoder = [], episode.ids, policy.encoder
    turns = []
    for n in range(len(episode.turns)):  # the last one ends at the episode's limit, whatever was written
        prompt, written = policy.seen[episode.number << 16 | n]
        left = LIMITS.max_response_tokens - (len(prompt) - len(episode.prompt))
        turns.append((prompt, written[:left]))
    trained = [i for start, end in episode.spans for i in ids[start:end]]
    if trained != [i for _, written in turns for i in written]:
        found.append("trained tokens are not the sampled ones")
    for n, ((prompt, written), turn) in enumerate(zip(turns, episode.turns, strict=True)):
        if ids[:len(prompt)] != prompt or ids[len(prompt):len(prompt) + len(written)] != written:
            found.append(f"turn {n + 1}: what it was sampled behind is not what it is trained behind")
        expected = "".join(f"\n{BEGIN}tool\n{call['text']}{END}" for call in turn.calls)
        if turn.behind and encoder.decode(turn.behind) != f"{expected}\n{BEGIN}assistant\n":
            found.append(f"turn {n + 1}: what stands behind it is not what its tools said")
        specials = sum(i >= encoder.encode_text(BEGIN)[0] for i in turn.behind)
        if turn.behind and specials != 2 * len(turn.calls) + 1:
            found.append(f"turn {n + 1}: a tool's result became {specials} special tokens")
    if not turns[0][0] == episode.prompt == ids[:len(episode.prompt)]:
        found.append("the prompt is another one")
    if len(ids) - len(episode.prompt) > LIMITS.max_response_tokens or len(episode.turns) > LIMITS.max_turns:
        found.append("a limit was passed")
    return found


def played(world: str, num_episodes: int, folder: Path,
           wrapped: Callable[[FuzzedPolicy], ToolPolicy] = lambda policy: policy, parallel: int = 8,
           ) -> tuple[list[Episode], FuzzedPolicy, TurnEncoder]:
    """Return the episodes of a world, whose journal lies beside `folder / world`."""
    chat = chat_encoder()
    encoder = TurnEncoder(chat, "the benchmark's tokenizer")
    policy = FuzzedPolicy(world, chat, encoder.end_ids[0])
    asked = order(world, {})
    environment: Any = make(asked)[0]
    tasks = [environment.EXAMPLES[n % len(environment.EXAMPLES)] for n in range(num_episodes)]
    with open_journal(folder / world, "play", {"world": world}) as journal:
        table = EpisodeTable(asked, encoder, LIMITS, parallel)
        return play(tasks, wrapped(policy), table, lines_in(journal)), policy, encoder


def _killed(world: str, num_episodes: int, after_s: float) -> list[Episode]:
    """Return the episodes of a world whose process was killed once, then continued."""
    with tempfile.TemporaryDirectory() as name:
        child = subprocess.Popen([sys.executable, __file__, "--play", world, "--episodes", str(num_episodes),
                                  "--folder", name])
        journal = work_folder(Path(name) / world) / RECORDS
        while not journal.exists() or journal.stat().st_size < 1000:
            time.sleep(0.02)
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        size_bytes = journal.stat().st_size if journal.exists() else 0
        print(f"  killed {after_s:.1f} s behind the first turn, {size_bytes:,} bytes of journal", flush=True)
        return played(world, num_episodes, Path(name))[0]


def main() -> None:
    """Play, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--play", choices=WORLDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        played(args.play, args.episodes, args.folder)
        return
    wrong = 0
    for world in WORLDS:
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            episodes, policy, encoder = played(world, args.episodes // len(WORLDS), Path(name))
        took_s = time.monotonic() - began_s
        rows = [row_of(episode, encoder) for episode in episodes]
        found = [problem for episode in episodes for problem in problems_of(episode, policy)]
        wrong += len(found)
        faults = sum((Counter(row["faults"]) for row in rows), Counter())
        turns, calls = (sum(row[key] for row in rows) for key in ("num_turns", "num_calls"))
        differ = sum(row["num_turns_that_differ"] for row in rows)
        print(f"{world}: {len(rows)} episodes, {turns} turns, {calls} calls, {took_s:.1f} s; "
              f"{len(found)} problems {found[:3]}\n  ends {dict(Counter(row['end'] for row in rows))}\n"
              f"  calls without result {dict(faults)}\n"
              f"  turns with other tokens when encoded again: {differ} of {turns}", flush=True)
        rng = random.Random(world)
        for _ in range(args.kills):
            again = _killed(world, len(rows), rng.uniform(0, took_s * 0.6))
            same = [row_of(episode, encoder) for episode in again] == rows
            wrong += not same
            print(f"  continued: {'the same end' if same else 'ANOTHER END'}", flush=True)
    if wrong:
        sys.exit(f"{wrong} problems")


if __name__ == "__main__":
    main()

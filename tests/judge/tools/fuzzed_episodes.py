"""Fuzzed tool episodes: a script instead of a model writes turns of every kind.

Calls, several calls at once, calls that are no JSON or name no tool, texts that spell special tokens, tokens
that no tokenizer would choose, turns without an end.  `problems_of` compares an episode with the turns that
the script remembers and with the template written out by hand.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from megatron_sov.chat.encode import ChatEncoder, TurnEncoder
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.episode import Episode, GeneratedTurn, open_episode_lines
from megatron_sov.judge.tools.playing import EpisodeSettings, ToolPolicy, play_episodes
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.work.progress.journal import open_journal
from tests.chat.byte_tokenizer import train_tokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (m.role == 'system' and tools) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORLDS = ("files", "calculator")
LIMITS = EpisodeLimits(max_turns=6, max_tool_chars=300, max_response_tokens=1200, max_calls_per_turn=3)
CALLS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "files": [("list_files", {}), ("write_file", {"path": "a/b.txt", "text": f"{BEGIN}user\n말 {END}" * 20}),
              ("read_file", {"path": "a/b.txt"}), ("delete_file", {"path": "notes.txt"}),
              ("write_file", {"path": "../b", "text": ""})],
    "calculator": [("calculate", {"expression": "2 ** 100 / 3"}), ("calculate", {"expression": "1 / 0"}),
                   ("calculate", {"expression": 3})],
}


def chat_encoder() -> ChatEncoder:
    """Return an encoder of a small byte-level tokenizer and a template that shows tools."""
    tokenizer = train_tokenizer(
        '<tool_call> {"name": "read_file", "arguments": {"path": "the room"}} </tool_call>\n', 500)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BEGIN, END)])
    return ChatEncoder(ChatTemplate(TEMPLATE, "", END, "the script's tokenizer"), tokenizer)


class FuzzedPolicy:
    """Writes turns of every kind; the kind follows from the random stream alone."""

    def __init__(self, world: str, encoder: ChatEncoder, end_id: int, seed: int = 0) -> None:
        self._calls, self.encoder, self._end_id, self._seed = CALLS[world], encoder, end_id, seed
        self._vocab_size = end_id + 1
        self.seen: dict[int, tuple[list[int], list[int]]] = {}
        """Stream -> prompt and generated turns."""

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


def find_token_problems(episode: Episode, policy: FuzzedPolicy) -> list[str]:
    """Return the defects in the tokens of an episode."""
    found, ids, encoder = [], episode.ids, policy.encoder
    turns = []
    for n in range(len(episode.turns)):  # the last turn ends at the episode's limit
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
    """Return the episodes of a world, with their journal in `folder / world`."""
    chat = chat_encoder()
    encoder = TurnEncoder(chat, "the script's tokenizer")
    policy = FuzzedPolicy(world, chat, encoder.end_ids[0])
    request = request_environment(world, {})
    environment: Any = build_versioned_environment(request)[0]
    tasks = [environment.EXAMPLES[n % len(environment.EXAMPLES)] for n in range(num_episodes)]
    with open_journal(folder / world, "play", {"world": world}) as journal:
        table = EpisodeSettings(request, encoder, LIMITS, parallel)
        return play_episodes(tasks, wrapped(policy), table, open_episode_lines(journal)), policy, encoder

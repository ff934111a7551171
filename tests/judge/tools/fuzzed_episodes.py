"""Fuzzed tool episodes, in which a random policy instead of a model writes the turns.

Turns have one or several calls, calls that are invalid JSON or name no tool, text that spells special tokens,
tokens that no tokenizer would choose, or no end. `find_token_problems` compares the tokens of an episode with
the recorded turns and with the chat template written by hand.
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
WORLDS = ("files", "calculator")  # built-in environments
LIMITS = EpisodeLimits(max_turns=6, max_tool_chars=300, max_response_tokens=1200, max_calls_per_turn=3)
CALLS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "files": [("list_files", {}), ("write_file", {"path": "a/b.txt", "text": f"{BEGIN}user\n말 {END}" * 20}),
              ("read_file", {"path": "a/b.txt"}), ("delete_file", {"path": "notes.txt"}),
              ("write_file", {"path": "../b", "text": ""})],
    "calculator": [("calculate", {"expression": "2 ** 100 / 3"}), ("calculate", {"expression": "1 / 0"}),
                   ("calculate", {"expression": 3})],
}


def build_small_encoder() -> ChatEncoder:
    """Return an encoder with a small byte-level tokenizer and a chat template that lists tools."""
    tokenizer = train_tokenizer(
        '<tool_call> {"name": "read_file", "arguments": {"path": "the room"}} </tool_call>\n', 500)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BEGIN, END)])
    return ChatEncoder(ChatTemplate(TEMPLATE, "", END, "the script's tokenizer"), tokenizer)


class FuzzedPolicy:
    """Writes turns of every kind. A turn depends only on the seed and the number of its random stream."""

    def __init__(self, world: str, encoder: ChatEncoder, end_id: int, seed: int = 0) -> None:
        self._calls, self.encoder, self._end_id, self._seed = CALLS[world], encoder, end_id, seed
        self._vocab_size = end_id + 1
        self.turns: dict[int, tuple[list[int], list[int]]] = {}
        """Stream -> token ids of the prompt and of the turn written after it."""

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        """Return one turn for each prompt, in the interface of `ToolPolicy`."""
        turns = []
        for prompt, stream in zip(prompts, streams, strict=True):
            ids = self._write_turn(random.Random(self._seed << 40 | stream))[:max_new_tokens]
            self.turns[stream] = (list(prompt), ids)
            turns.append(GeneratedTurn(ids, [-0.5] * len(ids)))
        return turns

    def _write_turn(self, rng: random.Random) -> list[int]:
        """Return the token ids of a turn of a random kind."""
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
            text = self._format_call("delete_everything", {"sure": True})
        elif kind == "spelled":
            text = f"I write {END}\n{BEGIN}user\nmyself. " + self._format_call(*rng.choice(self._calls))
            return [*self.encoder._plain_ids(text), self._end_id]
        else:
            times = rng.randrange(2, 6) if kind == "calls" else 1
            text = "So. " + "\n".join(self._format_call(*rng.choice(self._calls)) for _ in range(times))
        ids = self.encoder.encode_text(text)
        if kind == "odd":  # encoded character by character, which no tokenizer would do
            ids = [i for char in text for i in self.encoder.encode_text(char)]
        return ids if kind == "endless" else [*ids, self._end_id]

    @staticmethod
    def _format_call(name: str, arguments: dict[str, Any]) -> str:
        return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def find_token_problems(episode: Episode, policy: FuzzedPolicy) -> list[str]:
    """Return the defects of an episode's tokens: trained spans, prompts of turns, tool results, limits."""
    problems, ids, encoder = [], episode.ids, policy.encoder
    turns = []
    for n in range(len(episode.turns)):  # the last turn ends at the episode's limit
        prompt, written = policy.turns[episode.number << 16 | n]
        left = LIMITS.max_response_tokens - (len(prompt) - len(episode.prompt))
        turns.append((prompt, written[:left]))
    trained = [i for start, end in episode.spans for i in ids[start:end]]
    if trained != [i for _, written in turns for i in written]:
        problems.append("trained tokens are not the sampled tokens")
    for n, ((prompt, written), turn) in enumerate(zip(turns, episode.turns, strict=True)):
        if ids[:len(prompt)] != prompt or ids[len(prompt):len(prompt) + len(written)] != written:
            problems.append(f"turn {n + 1}: the prompt of sampling is not the prompt of training")
        expected = "".join(f"\n{BEGIN}tool\n{call['text']}{END}" for call in turn.calls)
        if turn.behind and encoder.decode(turn.behind) != f"{expected}\n{BEGIN}assistant\n":
            problems.append(f"turn {n + 1}: the text after it is not that of the tool results")
        num_special = sum(i >= encoder.encode_text(BEGIN)[0] for i in turn.behind)
        if turn.behind and num_special != 2 * len(turn.calls) + 1:  # begin and end of results, one more begin
            problems.append(f"turn {n + 1}: its tool results have {num_special} special tokens")
    if not turns[0][0] == episode.prompt == ids[:len(episode.prompt)]:
        problems.append("the prompt of the first turn is not the episode's prompt")
    if len(ids) - len(episode.prompt) > LIMITS.max_response_tokens or len(episode.turns) > LIMITS.max_turns:
        problems.append("the episode exceeds a limit")
    return problems


def play_fuzzed_episodes(world: str, num_episodes: int, folder: Path,
                         wrap_policy: Callable[[FuzzedPolicy], ToolPolicy] = lambda policy: policy,
                         parallel: int = 8) -> tuple[list[Episode], FuzzedPolicy, TurnEncoder]:
    """Play episodes of the example tasks of a built-in world, with their journal in `folder / world`.

    Args:
        world: Name in `WORLDS`.
        num_episodes: Number of episodes; the example tasks are repeated.
        folder: Parent folder of the journal.
        wrap_policy: Returns the policy to play with, given the fuzzed policy.
        parallel: Episodes played at the same time.

    Returns:
        The episodes, the fuzzed policy with its recorded turns, and the encoder of turns.
    """
    chat = build_small_encoder()
    encoder = TurnEncoder(chat, "the script's tokenizer")
    policy = FuzzedPolicy(world, chat, encoder.end_ids[0])
    request = request_environment(world, {})
    environment: Any = build_versioned_environment(request)[0]
    tasks = [environment.EXAMPLES[n % len(environment.EXAMPLES)] for n in range(num_episodes)]
    with open_journal(folder / world, "play", {"world": world}) as journal:
        settings = EpisodeSettings(request, encoder, LIMITS, parallel)
        episodes = play_episodes(tasks, wrap_policy(policy), settings, open_episode_lines(journal))
    return episodes, policy, encoder

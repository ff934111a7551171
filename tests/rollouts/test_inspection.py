"""The page of responses: those that are to be read are on it, and what strangers wrote stays text."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

import pytest

from megatron_sov.base.digests import SHA256, file_digest
from megatron_sov.cli import main
from megatron_sov.rollouts.inspection import page_of
from megatron_sov.rollouts.rows import UNFINISHED, Key, RewardRow, Rollout, part_name
from megatron_sov.rollouts.store import RolloutStore
from tests.rollouts.test_store import rollout as sound_row

VERSION = "8c1d22ab90e4f00d"
HOSTILE = "</pre><script>alert(1)</script>\x1b[2J"


def rollout(prompt: str, sample: int, end: str = "stop") -> Rollout:
    """A row of round 1, with a tool's result between two turns."""
    return sound_row(key=Key(prompt, sample, "f" * 64, "s" * 64), finish_reason=end,
                     record={"question": f"{prompt}? \ud800 {HOSTILE}"},
                     response=f"said {prompt} {sample} {HOSTILE}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RolloutStore:
    """Two pieces of two prompts with three samples each; the reward is a number of their own."""
    folder = tmp_path_factory.mktemp("read")
    store = RolloutStore.create(folder / "store", _tokenizer(folder / "tokenizer"), 100)
    rows = [rollout(f"p{i}", sample) for i in range(4) for sample in range(3)]
    rows[1], rows[7] = rollout("p0", 1, "length"), rollout("p2", 1, UNFINISHED)
    pieces = {part_name(1, 0): rows[:6], part_name(1, 1): rows[6:],
              part_name(1, 1, 1): [dataclasses.replace(rollout("p2", 1), attempt=1, response="went on")]}
    for name, part in pieces.items():
        store.add_rollouts(name, part, {})
        store.add_rewards(VERSION, name, [
            RewardRow(row.key, row.attempt, VERSION, None, "timeout", {}, HOSTILE) if row.key == rows[11].key
            else RewardRow(row.key, row.attempt, VERSION, int(row.key.prompt[1]) * 10 + row.key.sample,
                           "scored", {"format": 0.25}) for row in part if row.finish_reason != UNFINISHED])
    return store


def _tokenizer(folder: Path) -> str:
    """Write a tokenizer of three words that tests decode with; returns its digest."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    vocab = {"ask": 5, "result": 6, "reply": 7}
    Tokenizer(models.WordLevel(vocab, unk_token="ask")).save(str(folder / "tokenizer.json"))
    return file_digest(folder / "tokenizer.json", SHA256)


def shown(page: str, why: str) -> list[str]:
    """Return prompt and sample of the chapters that are there for a reason."""
    return re.findall(rf"<h2>Round 1, {why} <small>prompt (p\d, sample \d)</small></h2>", page)


def test_highest_lowest_cut_off_and_those_without_a_reward(store: RolloutStore) -> None:
    page = page_of(store, [1], VERSION, 3)
    assert shown(page, "highest reward") == ["p3, sample 1", "p3, sample 0", "p2, sample 2"]
    assert shown(page, "lowest reward") == ["p0, sample 0", "p0, sample 1", "p0, sample 2"]
    assert shown(page, "cut off") == ["p0, sample 1"]
    assert shown(page, "no reward") == ["p3, sample 2"]
    # brute force over the eleven rewards
    rewards = [i * 10 + sample for i in range(4) for sample in range(3) if (i, sample) != (3, 2)]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells == ["1", "12", f"{sum(rewards) / len(rewards):.4f}", "1", "1"]
    assert "<dd>0.25</dd>" in page and "<dd>3 to 4</dd>" in page and "<dd>timeout</dd>" in page
    # few responses are not shown as both
    few = page_of(store, [1], VERSION, 8)
    assert len(shown(few, "highest reward")) == 8 and len(shown(few, "lowest reward")) == 3
    assert "went on" in few and shown(few, "highest reward").count("p2, sample 1") == 1


def test_what_strangers_wrote_stays_text(store: RolloutStore) -> None:
    page = page_of(store, [1], VERSION, 12)
    assert "<script>alert" not in page and "\x1b" not in page and page.encode()
    assert html.escape("</pre><script>alert(1)</script>\\x1b[2J") in page


def test_a_tokenizer_tells_turns_apart(store: RolloutStore, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["rl", "store", "page", str(store.path), "--output", str(tmp_path / "page.html"), "--count", "1"]
    assert main(asked) == 0
    assert '<p class="label">model and tools</p>' in (tmp_path / "page.html").read_text()
    assert main([*asked, "--tokenizer", str(store.path.parent / "tokenizer")]) == 0
    page = (tmp_path / "page.html").read_text()
    turns = re.findall(r'<p class="label">([^<]*)</p><pre[^>]*>([^<]*)</pre>', page)
    assert turns[1:4] == [("model", "ask"), ("tools and template", "result"), ("model", "reply")]
    capsys.readouterr()
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"ask": 5}}}')
    for words, sentence in ((["--tokenizer", str(tmp_path)], "name the tokenizer of the model"),
                            (["--tokenizer", str(store.path)], "has no tokenizer.json"),
                            (["--round", "2"], "--round 2: .* has no parts of it"),
                            (["--version", "77"], f"--version 77: .* has rewards of {VERSION}"),
                            (["--count", "0"], "--count 0: must be at least 1")):
        assert main([*asked, *words]) == 2
        assert re.search(sentence, capsys.readouterr().err)

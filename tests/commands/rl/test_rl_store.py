"""`megatron-sov rl store`: the commands of its page, error messages, and removal of named rounds only."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from megatron_sov.base.errors import StopRequested, UserError
from megatron_sov.cli import main
from megatron_sov.commands.rl.store.reward_run import wait_for_store
from megatron_sov.post.rl.reward import ENVIRONMENT
from megatron_sov.rollouts.inspection import check_with_progress, format_store
from megatron_sov.rollouts.rows import STOP, UNFINISHED, Key, RewardRow, Rollout, StorePlan, format_part_name
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.rollouts.tables import REWARDS, ROLLOUTS
from megatron_sov.work.progress.locks import Claims
from tests.breakers import flip_bit
from tests.pages_typed import blocks, page_section, shell_lines
from tests.rollouts.test_store import create_rollout as sound_row

VERSION = "8c1d22ab90e4f00d"


def create_rollout(prompt: str, sample: int, **changes: Any) -> Rollout:
    """A sound row of round 1, with a tool's result between two tokens of policies."""
    return sound_row(sample, **{"key": Key(prompt, sample, "f" * 64, "s" * 64), "response": "it is\x1b[2J 4",
                                "record": {"prompt": "2 + 2?", "domain": "sums"},
                                "logprobs": np.array([-0.5, 0, -1.5], np.float32), **changes})


def fill_store(path: Path) -> RolloutStore:
    """Return a store of one round: two pieces, one continued response, and a reward."""
    store = RolloutStore.create(path, "sha256:ab", 100)
    late = create_rollout("p1", 0, finish_reason=UNFINISHED)
    parts = {format_part_name(1, 0): [create_rollout("p0", 0), create_rollout("p0", 1)],
             format_part_name(1, 1): [late, create_rollout("p1", 1, record={"prompt": "Hi"})],
             format_part_name(1, 1, 1): [dataclasses.replace(late, attempt=1, finish_reason="length")]}
    for name, rows in parts.items():
        store.add_rollouts(name, rows, {})
        rewards = []
        for row in rows:
            is_scored = row.finish_reason != UNFINISHED
            reward, status = (row.key.sample, "scored") if is_scored else (None, "failed")
            rewards.append(RewardRow(row.key, row.attempt, VERSION, reward, status, {"format": 0.5}))
        store.add_rewards(VERSION, name, rewards)
    return store


@pytest.fixture(scope="module")
def complete_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests read, or copy."""
    return fill_store(tmp_path_factory.mktemp("sound") / "store").path


@pytest.fixture
def store(complete_store: Path, tmp_path: Path) -> RolloutStore:
    """A copy of the store, for damage."""
    shutil.copytree(complete_store, tmp_path / "store")
    return RolloutStore.open(tmp_path / "store")


def test_the_page_is_true(complete_store: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(complete_store, "work/store")
    text = page_section("rl.md", "The rollout store")
    (program,) = blocks(text, "python")
    exec(program, {})
    output = capsys.readouterr().out
    assert json.loads(output.replace("'", '"')) == {"prompt": ["p0", "p1"], "reward_mean": [0.5, 0.5]}
    for line in shell_lines(text, "bash"):
        assert main(shlex.split(line)[1:]) == 0, line
    assert not list(Path("work/store/rollouts").iterdir()) and not list(Path("work/store/rewards").iterdir())
    columns = page_section("formats.md", "Rollout store")
    for kind, schema in (("rollouts", ROLLOUTS), ("rewards", REWARDS)):
        table = columns.partition(f"`{kind}.parquet`:")[2].partition("\n`rewards")[0]
        columns_named: list[str] = []
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            columns_named += re.findall(r"`(\w+)`", row)
        assert sorted(columns_named) == sorted(schema.names)
        file = next(complete_store.rglob(f"{kind}.parquet"))
        assert sorted(parquet.read_schema(file).names) == sorted(columns_named)


def test_show_prints_a_row_without_its_control_characters(complete_store: Path, read_output: Any) -> None:
    words = ["rl", "store", "show", str(complete_store), format_part_name(1, 0), "1"]
    output = read_output(*words)
    assert output.endswith("response:\nit is\\x1b[2J 4\n") and "\x1b" not in output
    parsed = json.loads(read_output(*words, "--json"))
    assert parsed["turns"] == [{"tokens": [0, 1], "versions": [3], "mean_logprob": -0.5},
                               {"tokens": [2, 3], "versions": [4], "mean_logprob": -1.5}]
    assert [(row["reward_version"], row["reward"]) for row in parsed["rewards"]] == [(VERSION, 1.0)]


def find_part_file(store: RolloutStore, below: str) -> Path:
    """Return the file of the first part of a folder."""
    return store.path / below / format_part_name(1, 0) / f"{below.partition('/')[0]}.parquet"


def add_rows(store: RolloutStore, name: str, *rows: Rollout, round: int = 2) -> None:
    """Publish rows in another round."""
    store.add_rollouts(name, [dataclasses.replace(row, round=round) for row in rows], {})


DAMAGES: dict[str, tuple[Callable[[RolloutStore], object], list[str]]] = {
    "a flipped bit": (lambda s: flip_bit(find_part_file(s, "rollouts")),
                      ["piece-0000/rollouts.parquet: its content differs"] * 2),
    "a torn file": (lambda s: find_part_file(s, "rollouts").write_bytes(b"PAR1"),
                    ["rollouts.parquet has 4 bytes, must have"] * 2),
    "a rewards' flipped bit": (lambda s: flip_bit(find_part_file(s, f"rewards/{VERSION[:12]}")),
                               ["rewards.parquet: its content differs"]),
    "a stranger": (lambda s: (s.path / "rollouts/notes").mkdir(), ["rollouts/notes: is not a part of the"]),
    "a key twice": (lambda s: add_rows(s, format_part_name(2, 0), create_rollout("p0", 0)),
                    [r"round-0002-piece-0000/rollouts.parquet: row 0 has the key and the attempt of .*"
                     r"round-0001-piece-0000/rollouts.parquet: row 0$"]),
    "no attempt before": (lambda s: add_rows(s, format_part_name(2, 0), create_rollout("p9", 0, attempt=1)),
                          ["row 0 continues an attempt that is not there$"]),
    "after a finished one": (
        lambda s: add_rows(s, format_part_name(2, 0), create_rollout("p0", 0, attempt=1)),
        ["row 0 continues a finished one: .*round-0001-piece-0000.*row 0$"]),
    "a row's problem": (
        lambda s: add_rows(s, format_part_name(2, 0), create_rollout("q", 0, temperature=0.0)),
        ["round-0002-piece-0000/rollouts.parquet: row 0 has temperature 0.0$"]),
    "a reward of no part": (lambda s: shutil.rmtree(s.path / "rollouts" / format_part_name(1, 0)),
                            ["judges rows that cannot be read: .*does not exist"]),
    "a reward of no row": (
        lambda s: s.add_rewards("w" * 16, format_part_name(1, 0), [
            RewardRow(create_rollout("p0", i).key, 0, "w" * 16, 1.0, "scored") for i in (0, 7, 0)]),
        ["row 1 judges sample 7 of prompt p0, attempt 0, which round-0001-piece-0000 does not hold",
         "row 2 judges a row a second time"]),
}
"""Name -> (function that damages the store, patterns of the problems that are found)."""


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_every_problem(name: str, store: RolloutStore) -> None:
    damage_store, patterns = DAMAGES[name]
    damage_store(store)
    for problem, pattern in zip(check_with_progress(store).problems, patterns, strict=True):
        assert re.search(pattern, problem), (problem, pattern)


def test_gc_removes_only_unused_files(store: RolloutStore, capsys: Any, get_refusal: Any,
                                      read_output: Any) -> None:
    claims = Claims(store.claims, 60)
    published_claims = (format_part_name(1, 0), f"reward-{VERSION[:12]}-{format_part_name(1, 0)}")
    needed_claims = (format_part_name(2, 0), f"reward-{'0' * 12}-{format_part_name(1, 0)}")
    for name in (*published_claims, *needed_claims):
        assert claims.take(name) is not None
    # folders that a killed job and a running job are writing, and two that a killed `gc` was deleting
    old, new = store.path / "rollouts/.round-0002-piece-0000.new-1", store.path / "rollouts/.a.new-2"
    half_deleted = [store.path / "rewards/.v.gone-1", store.claims / ".c.gone-2"]
    for folder in (old, new, *half_deleted):
        folder.mkdir()
        (folder / "rollouts.parquet").write_bytes(b"1")
    for path in (old / "rollouts.parquet", old):
        os.utime(path, (time.time() - 7200,) * 2)
    command = ["rl", "store", "gc", str(store.path)]
    assert "deleted 5 folders" in read_output(*command) and not any(map(Path.exists, half_deleted))
    assert (old.exists(), new.exists()) == (False, True)
    assert sorted(path.name for path in store.claims.iterdir()) == sorted(needed_claims)
    assert len(store.parts()) == 3 and len(store.parts(version=VERSION)) == 3

    assert main([*command, "--rounds", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("would delete") == 6 and "would delete 6 folders" in captured.err
    assert len(store.parts()) == 3
    assert (f"no rewards with this version (versions: {VERSION[:12]})"
            in get_refusal(*command, "--version", "nonsense"))
    read_output(*command, "--version", VERSION)
    assert store.versions() == [] and len(store.parts()) == 3
    read_output(*command, "--rounds", "1-4", "--yes")
    assert [path.name for path in (store.path / "rollouts").iterdir()] == [new.name]


@pytest.mark.each("words, message", [
    (["gc", "nowhere"], "nowhere: is no rollout store"),
    (["show", "STORE", "piece", "0"], "PART 'piece': .* has no such part"),
    (["show", "STORE", format_part_name(1, 9), "0"], "PART 'round-0001-piece-0009': .* has no such part"),
    (["show", "STORE", format_part_name(1, 0), "2"], "ROW 2: round-0001-piece-0000 has 2 rows"),
    (["gc", "STORE", "--rounds", "4-2"], "--rounds 4-2: must be a round, or the first and the last one")])
def test_mistakes_are_one_sentence(words: list[str], message: str, complete_store: Path,
                                   get_refusal: Any) -> None:
    typed = [str(complete_store) if word == "STORE" else word for word in words]
    [line] = get_refusal("rl", "store", *typed).splitlines()
    assert re.search(message, line)


def test_a_foreign_part_is_not_listed(store: RolloutStore, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    other = RolloutStore.create(tmp_path / "other", "sha256:cd", 100)
    other.add_rollouts(format_part_name(1, 7), [create_rollout("p7", 0)], {})
    path = store.part_path(format_part_name(1, 7))
    shutil.copytree(other.part_path(format_part_name(1, 7)), path)
    Claims(store.claims, 60).take("round-0002-piece-0000")
    lines = list(format_store(store))
    assert f"skipped: {path}: belongs to another store (tokenizer sha256:cd, 100 ids; this one:" in (
        capsys.readouterr().err)
    assert re.search(rf"^round-0001-piece-0001-attempt-1 +1 rows .* judged by {VERSION}$", lines[2])
    assert lines[3] == f"{store.path}: 3 parts, 5 rows"
    assert f"claimed: round-0002-piece-0000 by process {os.getpid()} on " in lines[4]


def test_rl_train_waits_for_a_store_that_does_not_exist_yet(tmp_path: Path) -> None:
    path = tmp_path / "store"
    threading.Timer(0.2, RolloutStore.create, (path, "sha256:" + "0" * 64, 512)).start()
    assert wait_for_store(path, 600.0).vocab_size == 512


def test_waiting_for_a_missing_store_ends_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"store: is no rollout store \(it has no store.json\)"):
        wait_for_store(tmp_path / "store", 0.0)
    with pytest.raises(StopRequested, match=r"store: the store was not created within 0.1 s"):
        wait_for_store(tmp_path / "store", 0.1)


def test_waiting_that_ends_before_the_last_round_is_not_success(tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    store = RolloutStore.create(tmp_path / "store", "sha256:" + "0" * 64, 512)
    key = Key("0" * 16, 0, "p" * 64, "s" * 16)
    row = Rollout(key, 1, 0, {"prompt": "?"}, np.array([1], np.int32), np.array([2], np.int32),
                  np.array([-1], np.float32), np.zeros(1, np.int32), STOP, "!", 1.0, "test", 0.0, 1.0)
    command = ["rl", "reward", "--store", str(store.path), "--reward", ENVIRONMENT]
    outcome = {"reward": 1.0, "status": "scored", "components": {}, "reason": ""}
    store.add_rollouts("round-0001-piece-0000", [replace(row, outcome=outcome)],
                       StorePlan(3, 1).to_provenance(0))
    assert main([*command, "--wait", "0.1"]) == 75
    assert (f"warning: {store.path}: no new response for 0.1 s, and 1 of 1 pieces of round 2 are not "
            "written; repeat the command, or raise --wait, because training waits") in capsys.readouterr().err
    assert main([*command, "--wait", "600", "--rounds", "1"]) == 0
    assert main(command) == 0

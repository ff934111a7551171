"""Rewards by name and by file, and what is said of wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.rewards.registry import make, order

OWN = '''
class Contains:
    """Right is a response with a word."""

    def __init__(self, *, word: str = "yes", times: int = 1) -> None:
        self.word, self.times = word, times

    def score(self, row):
        return float(row["response"].count(self.word) >= self.times)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "contains.py"
    path.write_text(OWN)
    return path


def test_a_reward_of_ones_own_takes_its_settings(file: Path) -> None:
    made = make(order(f"{file}:Contains", {"word": "ja", "times": 2}))
    assert made.reward.score({"response": "ja, ja"}) == 1.0
    assert made.reward.score({"response": "ja"}) == 0.0


def test_its_version_is_of_its_file_and_settings(file: Path) -> None:
    def version(**settings: object) -> str:
        return make(order(f"{file}:Contains", settings)).version

    before = version()
    assert before == version(word="yes") != version(word="no")
    file.write_text(OWN.replace(">=", ">"))
    assert version() != before


def test_a_file_that_changes_behind_the_order_is_refused(file: Path) -> None:
    asked = order(f"{file}:Contains", {})
    before = make(asked).version
    file.write_text(OWN.replace(">=", ">"))
    with pytest.raises(UserError, match=r"contains\.py has changed since this command began"):
        make(asked)
    assert make(order(f"{file}:Contains", {})).version != before


def test_a_reward_that_cannot_be_made_is_one_sentence(file: Path) -> None:
    file.write_text(OWN.replace("self.word, self.times = word, times", "raise ValueError('no word')"))
    with pytest.raises(UserError, match=r"reward .*contains\.py:Contains: ValueError: no word"):
        make(order(f"{file}:Contains", {}))


@pytest.mark.parametrize(("settings", "said"), [
    ({"wrod": "x"}, "wrod: no such setting; did you mean 'word'?"),
    ({"times": "many"}, 'times = "many" must be a whole number'),
])
def test_wrong_settings_are_named(file: Path, settings: dict, said: str) -> None:
    with pytest.raises(UserError) as e:
        make(order(f"{file}:Contains", settings))
    assert said in str(e.value)


def test_what_is_no_reward_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("class Wrong:\n    def score(self):\n        return 1\n")
    with pytest.raises(UserError, match=r"a reward needs score\(self, row\)"):
        order(f"{tmp_path}/wrong.py:Wrong", {})


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="reward 'maht': does not exist"):
        order("maht", {})


def test_a_reward_function_is_told_the_class_that_wraps_it(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    function = ("def starts_well(completions, prompt, **kwargs):\n"
                "    return [float(c.startswith('yes')) for c in completions]\n")
    file.write_text(function)
    with pytest.raises(UserError, match="is a function; a reward is a class") as e:
        order(f"{file}:starts_well", {})
    lines = str(e.value).partition("\n")[2]
    file.write_text(f"{function}\n{lines}\n")
    made = make(order(f"{file}:RewardStartsWell", {}))
    assert made.reward.score({"response": "yes", "prompt": "p"}) == 1.0

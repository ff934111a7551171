"""Tasks of the suites over synthetic items, as lm-eval makes them; rewards that judge in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.bench.lm.tasks import DATA
from megatron_sov.bench.suites import folding
from megatron_sov.bench.suites.catalogue import SUITES_FOLDER, suite_tasks
from megatron_sov.judge.rewards.reward import Result, Row, judged

sys.path.append(str(Path(__file__).parent))  # `suite_items`


class Here:
    """Runs a reward without processes of its own; those are tested where they live."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return [judged(self.reward, row) for row in rows]


@pytest.fixture(autouse=True)
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "runner", lambda asked, made, workers: Here(made.reward))


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[str], Any]:
    """Name -> lm-eval's task over the files in the test's folder."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    def load(name: str) -> Any:
        config = load_yaml(suite_tasks()[name].path)
        assert config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"] = _placed(config["dataset_kwargs"], tmp_path)
        return ConfigurableTask(config=config)

    assert SUITES_FOLDER.is_dir()
    return load


def _placed(value: Any, data_dir: Path) -> Any:
    if isinstance(value, str):
        return value.replace(DATA, str(data_dir))
    if isinstance(value, dict):
        return {key: _placed(part, data_dir) for key, part in value.items()}
    return [_placed(part, data_dir) for part in value] if isinstance(value, list) else value

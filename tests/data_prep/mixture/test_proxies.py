"""Small models: the command that trains one, what is kept of it, kills, failures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.mixture.search import LOG, RESULT, Proxies, ProxySettings, command, key_of
from megatron_sov.base.errors import UserError
from megatron_sov.train.stages.stage_config import StageOptions, parse_stage
from megatron_sov.work.progress.resumable import part_folder
from tests.typed_words import typed

SETTINGS = ProxySettings("tiny-qwen3-4b", ((Path("shards"), "a" * 64),), ("optim.lr=1e-3",), 7, 64, 3)
STAND_IN = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
blend = json.loads(sys.argv[2])
print("starting"); (run / "started").touch()
if "slow" in blend: time.sleep(3600)
if "bad" in blend: sys.exit("error: optim.lr = 9 is too high\\n  lower it")
(run / "checkpoints").mkdir()
(run / "events.jsonl").write_text("\\n".join(json.dumps({"event": "eval",
                                                         "heldout": {"clean": {"bits_per_byte": b}}})
                                            for b in (9.0, blend["good"])))
"""


def stand_in(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """In the place of `megatron-sov pretrain`: writes the events of a run at once."""
    run = arguments[arguments.index("--run") + 1]
    phases = next(a for a in arguments if a.startswith("data.phases=")).removeprefix("data.phases=")
    with open(log, "ab") as out:
        return subprocess.Popen([sys.executable, "-S", "-c", STAND_IN, run,
                                 json.dumps(json.loads(phases)[0]["blend"])],
                                stdout=out, stderr=subprocess.STDOUT)


def losses(work: Path, blends: list[dict[str, float]], workers: int = 2) -> list[dict[str, float]]:
    return Proxies(work, SETTINGS, workers, stand_in).losses(blends, lambda: None)


def test_the_command_is_one_that_pretrain_takes(packed_data: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=((packed_data.text, "a" * 64),),
                                   settings=("optim.lr=1e-3", "model.vocab_size=512"))
    name, *arguments = command(settings, {"even": 0.75, "odd": 0.25, "none": 0.0}, tmp_path / "run")
    config = parse_stage(typed(StageOptions, arguments), "lm").config
    assert name == "pretrain" and config.recipe == "tiny-qwen3-4b"
    [phase] = config.data.phases
    assert phase.blend == {"even": 0.75, "odd": 0.25} and phase.seq_len == 64
    assert (config.train.steps, config.train.seed, config.train.num_threads,
            config.optim.lr) == (7, 3, 1, 1e-3)


def test_losses_come_in_order_and_the_rest_of_a_model_goes(tmp_path: Path) -> None:
    blends = [{"good": i / 10} for i in range(1, 6)]
    assert losses(tmp_path, blends) == [{"clean": i / 10} for i in range(1, 6)]
    folders = [part_folder(tmp_path, key_of(SETTINGS, blend)) for blend in blends]
    assert all(sorted(p.name for p in folder.iterdir()) == [LOG, RESULT] for folder in folders)
    before = {folder: (folder / RESULT).stat().st_mtime_ns for folder in folders}
    assert losses(tmp_path, [*blends[::-1], {"good": 0.9}])[-1] == {"clean": 0.9}
    assert {folder: (folder / RESULT).stat().st_mtime_ns for folder in folders} == before


def test_a_folder_is_named_by_all_that_losses_depend_on() -> None:
    keys = {key_of(SETTINGS, {"good": 0.5}), key_of(SETTINGS, {"good": 0.6})}
    for field, value in {"recipe": "x", "steps": 8, "seq_len": 8, "seed": 1, "settings": (),
                         "start_from": "x",
                         "files_sha256": ("x",), "data": ((Path("shards"), "b" * 64),)}.items():
        keys.add(key_of(dataclasses.replace(SETTINGS, **{field: value}), {"good": 0.5}))
    assert len(keys) == 10
    moved = dataclasses.replace(SETTINGS, data=((Path("/elsewhere"), "a" * 64),))
    assert key_of(moved, {"good": 0.5}) in keys


def test_a_model_that_fails_is_told_in_its_own_words_and_others_stay(tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        losses(tmp_path, [{"good": 0.1}, {"bad": 1.0}, {"slow": 1.0}], workers=1)
    log = part_folder(tmp_path, key_of(SETTINGS, {"bad": 1.0})) / LOG
    assert str(e.value) == (
        "a small model could not be trained (exit code 1): optim.lr = 9 is too high lower it; all it wrote "
        f"is in {log}")
    assert losses(tmp_path, [{"good": 0.1}]) == [{"clean": 0.1}]
    (part_folder(tmp_path, key_of(SETTINGS, {"good": 0.1})) / RESULT).write_text("{")
    with pytest.raises(UserError, match=r"cannot be read .* delete .* and run the command again"):
        losses(tmp_path, [{"good": 0.1}])


def test_a_failure_ends_the_models_that_still_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be trained"):
        losses(tmp_path, [{"slow": 1.0}, {"bad": 1.0}])
    started = part_folder(tmp_path, key_of(SETTINGS, {"slow": 1.0})) / "run/started"
    assert started.exists() or not started.parent.exists()


def test_models_end_with_a_killed_search(tmp_path: Path) -> None:
    """What goes on alone would hold its folder against the search that goes on."""
    program = f"""
import os, sys
from pathlib import Path
from data_prep.mixture.search import Proxies, start
import data_prep.mixture.search as proxies
proxies.command = lambda settings, blend, run: ["{tmp_path}/pid"]
proxies.key_of = lambda *facts: "k"
proxies.sys.executable = "{tmp_path}/model"
Proxies(Path("{tmp_path}/work"), None, 1).losses([dict(a=1.0)], lambda: None)
"""
    (tmp_path / "model").write_text(f"#!/bin/sh\ncd {tmp_path}\necho $$ > new && mv new pid\nexec sleep 60\n")
    (tmp_path / "model").chmod(0o755)
    search = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    while not (tmp_path / "pid").exists():
        assert search.poll() is None
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    search.send_signal(signal.SIGKILL)
    search.wait()
    deadline_s = time.monotonic() + 600
    while is_running(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

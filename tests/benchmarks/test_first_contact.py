"""What is tried on the first GPU runs to its end without one: with the double, on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import part_fp8
import part_losses
import part_transfers
from part_big_rank import LADDER, LAYOUT, NUM_RANKS, RECIPE
from setting import Failed, Setting, largest

GPU = Path(__file__).parents[2] / "benchmarks/gpu"
ALONE = ("attention", "fp8")
"""Parts that start no process."""
QUICK = ("installation", *ALONE, "big_rank")
"""The other parts start commands of their own."""


def first_contact(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GPU / "first_contact.py"), "--out", str(out), "--dry", *words],
                          capture_output=True, text=True, check=False)


def alone(out: str) -> None:
    """Runs in a process that has imported everything: does parts as processes of their own would."""
    import first_contact

    for part in ALONE:
        first_contact.run_here(part, Setting(Path(out), dry=True))


@pytest.mark.slow
def test_parts_pass_and_are_kept(te_ranks: Any, job: Any, tmp_path: Path) -> None:
    te_ranks(job(__file__, "alone", 1, {"out": str(tmp_path)}))
    done = first_contact(tmp_path, "--parts", ",".join(QUICK))
    results = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in QUICK}
    assert done.returncode == 0 and {r["status"] for r in results.values()} == {"PASS"}, results
    assert all(max(errors) < 1e-5 for errors in results["attention"]["figures"].values())
    assert results["big_rank"]["figures"]["FP8"]["TFLOP/s"] > 0
    assert [line.split()[1] for line in done.stdout.splitlines() if line.endswith(" kept")] == [*ALONE]


@pytest.mark.distributed
def test_parts_that_start_commands(run_command: Any, packed_data: Any, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Their commands, options and figures, with forks in the place of new processes."""

    def command(self: Setting, *words: str | Path, on_gpu: bool = True, **environment: str) -> str:
        done = run_command(*map(str, words[1:]), program=str(words[0]))
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    monkeypatch.setattr(Setting, "command", command)
    monkeypatch.setattr(part_losses, "data", lambda setting: packed_data.text)
    setting = Setting(tmp_path, dry=True)
    losses = part_losses.measure(setting)
    assert losses["tiny-solar-open, fp32"]["routers"] == 2
    assert {found["worst relative difference"] for found in losses.values()} == {0.0}
    # what a part that failed has left is not in the way
    again = part_losses.train(setting, "tiny-solar-open", setting.work / "staying", 1, *part_losses.SMALL)
    assert again == losses["tiny-solar-open, fp32"]["gpu"][:1]
    figures = part_transfers.measure(setting)
    assert all(value > 0 for name, value in figures.items() if name != "python") and len(figures) == 8


@pytest.mark.parametrize(("name", "words"), LADDER)
def test_each_step_of_the_big_rank_is_one_that_training_takes(name: str, words: tuple[str, ...]) -> None:
    problems = apply_settings(recipes.get(RECIPE), [*LAYOUT, *words]).problems(NUM_RANKS)
    # the batch of a run of so many processes is not what is measured
    assert [p for p in problems if "global_batch_size" not in p.key] == [], name


def test_what_is_no_number_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max` and `>` both pass over NaN, the first thing that a broken kernel gives."""
    nan = float("nan")
    assert largest([1.0, 3.0, 2.0]) == 3
    assert math.isnan(largest([1.0, nan])) and math.isnan(largest([nan, 1.0]))
    setting = Setting(tmp_path, dry=True)
    monkeypatch.setattr(part_fp8, "products", lambda *_: {"fprop": 0.01, "dgrad": nan, "wgrad": 0.01})
    with pytest.raises(Failed, match="tensorwise: products differ from their emulation"):
        part_fp8.measure(setting)
    monkeypatch.setattr(part_losses, "train", lambda *_, on_gpu=True: [1.0, nan if on_gpu else 1.0])
    monkeypatch.setattr(part_losses, "routers", lambda run, step: {"router": torch.tensor(float(step))})
    with pytest.raises(Failed, match="tiny-solar-open, fp32: losses differ by nan"):
        part_losses.compare(setting, "tiny-solar-open", "fp32", 2)


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    assert first_contact(tmp_path, "--parts", "fp9").returncode == 2
    module = tmp_path / "part_fp8.py"
    module.write_text("from setting import Failed\ndef measure(setting):\n    raise Failed('no', found=1)\n")
    code = ("import sys; sys.path[:0] = sys.argv[1:3]; import first_contact, setting; "
            "from pathlib import Path; "
            "first_contact.run_here('fp8', setting.Setting(Path(sys.argv[1]), True))")
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(GPU)], check=True)
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert (found["status"], found["problem"], found["figures"]) == ("FAIL", "no", {"found": 1})

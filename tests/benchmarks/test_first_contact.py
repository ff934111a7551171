"""The script for the first GPU run completes on a CPU with the Transformer Engine double."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from tests import releases
from tests.te_double.contract import TE, TE_VERSION
from tests.te_double.library_shapes import CONTRACT, Sources, differences

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import first_contact
import part_big_rank
import part_fp8
import part_losses
import part_post
import part_transfers
from part_big_rank import LADDER, LAYOUT, NUM_RANKS, RECIPE
from setting import Failed, Setting, largest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"
SYMBOLS = json.loads(CONTRACT.read_text())[TE]["symbols"]
QUICK = ("installation", "attention", "fp8")
"""Parts that start no process; the other parts run commands or train."""


def run_first_contact(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GPU / "first_contact.py"), "--out", str(out), "--dry", *words],
                          capture_output=True, text=True, check=False)


def quick(out: str) -> None:
    """Runs in a process that has imported everything: does parts as processes of their own would."""
    for part in QUICK:
        first_contact.run_here(part, Setting(Path(out), dry=True))


@pytest.mark.deep
def test_parts_pass_and_store_their_results(te_ranks: Any, job: Any, tmp_path: Path) -> None:
    te_ranks(job(__file__, "quick", 1, {"out": str(tmp_path)}))
    result = run_first_contact(tmp_path, "--parts", ",".join(QUICK))
    results = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in QUICK}
    assert result.returncode == 0 and {r["status"] for r in results.values()} == {"PASS"}, results
    errors = results["attention"]["figures"]
    assert all(max(found) < 1e-5 for case, found in errors.items() if "heads" in case)
    assert [line.split()[1] for line in result.stdout.splitlines() if line.endswith(" kept")] == [*QUICK]
    assert "not in a dry run: torch varlen" in result.stdout


@pytest.mark.deep
def test_a_big_rank_trains_at_each_step_of_the_ladder(tmp_path: Path) -> None:
    assert run_first_contact(tmp_path, "--parts", "big_rank").returncode == 0
    result = json.loads((tmp_path / "big_rank.json").read_text())
    assert result["status"] == "PASS"
    assert {name for name, _ in LADDER} - {part_big_rank.GRAPHS} < result["figures"].keys()
    fp8, overlapped = (result["figures"][step] for step in ("FP8", "overlapped messages"))
    assert fp8["TFLOP/s"] > 0 and fp8["losses"] != overlapped["losses"], "nothing was quantized"


@pytest.mark.distributed
@pytest.mark.deep
def test_parts_that_start_commands(run_command: Any, packed_data: Any, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Their commands, options and figures, with forks in the place of new processes."""

    def command(self: Setting, *words: str | Path, on_gpu: bool = True) -> str:
        result = run_command(*map(str, words[1:]), program=str(words[0]))
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    def commands(self: Setting, lines: Sequence[Sequence[str | Path]], *,
                 on_gpu: bool = True) -> Iterator[str]:
        for words in lines:
            command(self, *words)
            yield ""

    monkeypatch.setattr(Setting, "command", command)
    monkeypatch.setattr(Setting, "commands", commands)
    monkeypatch.setattr(part_losses, "data", lambda setting: (packed_data.text, []))
    monkeypatch.setattr(part_losses, "WAYS", {"fp32": part_losses.WAYS["fp32"]})
    monkeypatch.setattr(part_losses, "RECIPES", part_losses.RECIPES[:1])
    setting = Setting(tmp_path, dry=True)
    losses = dict(part_losses.measure(setting))
    assert losses.pop("runs on the CPU") == 2
    assert losses["tiny-solar-open, fp32"]["routers"] == 2
    assert {found["worst relative difference"] for found in losses.values()} == {0.0}
    # files of a failed part do not interfere
    command(setting, *part_losses.training(setting, "tiny-solar-open", setting.work / "staying", 1,
                                           *part_losses.SMALL))
    again = part_losses.losses(setting.work / "staying")
    assert again == losses["tiny-solar-open, fp32"]["gpu"][:1]
    monkeypatch.setattr(part_post, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(part_post, "NUMBERS", 16)
    monkeypatch.setattr(part_post, "data", part_losses.data)
    (setting.work / "tokenizer").symlink_to(packed_data.tokenizer)
    [(_, behind)] = part_post.measure(setting)
    assert behind.pop("same responses") == "32 of 32" and len(behind.pop("losses of rounds")) == 2
    assert behind == dict.fromkeys(part_post.STAGES, 0.0)
    figures = dict(part_transfers.measure(setting))
    assert all(value > 0 for value in figures.values() if isinstance(value, (int, float)))
    assert len(figures) == 9


@pytest.mark.each(("name", "words"), LADDER)
def test_big_rank_uses_settings_that_training_accepts(name: str, words: tuple[str, ...]) -> None:
    problems = apply_settings(recipes.get(RECIPE), [*LAYOUT, *words]).problems(NUM_RANKS)
    # the global batch of so many processes is not measured
    assert [p for p in problems if "global_batch_size" not in p.key] == [], name


@pytest.mark.deep
def test_the_real_library_has_the_contracts_shape() -> None:
    try:
        sources = Sources(releases.fetch_wheel("transformer-engine", TE_VERSION))
    except OSError as e:
        pytest.skip(str(e))
    assert list(differences(SYMBOLS, sources)) == []
    assert len(list(differences({f"{TE}.pytorch.Linear": {"__init__": "(size)", "none": "()"},
                                 f"{TE}.pytorch.gone": "()"}, sources))) == 3


def test_nan_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max` and `>` both pass over NaN, the first thing that a broken kernel gives."""
    nan = float("nan")
    assert largest([1.0, 3.0, 2.0]) == 3
    assert math.isnan(largest([1.0, nan])) and math.isnan(largest([nan, 1.0]))
    setting = Setting(tmp_path, dry=True)
    monkeypatch.setattr(part_fp8, "products", lambda *_: {"fprop": 0.01, "dgrad": nan, "wgrad": 0.01})
    figures: dict[str, Any] = {}
    with pytest.raises(Failed, match="tensorwise: products differ from their emulation"):
        figures.update(part_fp8.measure(setting))
    monkeypatch.setattr(part_losses, "losses", lambda run: [1.0, nan if "gpu" in run.name else 1.0])
    monkeypatch.setattr(part_losses, "routers", lambda run, step: {"router": torch.tensor(float(step))})
    _, [problem] = part_losses.Comparison("tiny-solar-open", "fp32").figures(setting, 2)
    assert problem.startswith("tiny-solar-open, fp32: losses differ by nan")


def write_part(folder: Path, code: str) -> None:
    """Write a part in place of `fp8`, and a program that runs it."""
    (folder / "part_fp8.py").write_text(code)
    (folder / "first_contact.py").write_text(
        f"import sys; sys.path[1:1] = [{str(GPU)!r}]\n"
        f"exec(compile(open({str(GPU / 'first_contact.py')!r}).read(), __file__, 'exec'))")


ENDLESS = ("import subprocess, time\ndef measure(setting):\n"
           "    yield 'child', subprocess.Popen(['sleep', '1000']).pid\n    time.sleep(1000)\n")


def test_a_part_without_end_leaves_its_figures_and_no_process(tmp_path: Path, ends: Any,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A remaining process would hold the GPU's memory."""
    write_part(tmp_path, ENDLESS)
    monkeypatch.setattr(first_contact, "__file__", str(tmp_path / "first_contact.py"))
    waited_for = first_contact.subprocess.Popen.wait

    def wait(process: Any, timeout: float | None = None) -> int:
        """Find the budget spent as soon as the figure is there: the test waits for an event."""
        while timeout == 7.0 and not (tmp_path / "fp8.json").exists():
            time.sleep(0.01)
        return waited_for(process, 0.0 if timeout == 7.0 else timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    result = first_contact.run_apart("fp8", Setting(tmp_path, dry=True), 7.0)
    assert (result["status"], result["problem"]) == ("FAIL", "not done within 7 s")
    assert ends(result["figures"]["child"])

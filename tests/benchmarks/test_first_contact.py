"""The script for the first GPU run completes on a CPU with the Transformer Engine double."""

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.footprint.memory import build_account
from tests import releases
from tests.te_double.contract import TE, TE_VERSION
from tests.te_double.library_shapes import CONTRACT, Sources, differences

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import first_contact
import host_time
import parcel
import part_fp8
import part_losses
import part_post
import part_transfers
from part_big_rank import CASES, LAYOUT, NUM_RANKS, RECIPE
from setting import CUT, EVENTS, PASS, RUNGS, Failed, Rung, Setting, find_largest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"
SYMBOLS = json.loads(CONTRACT.read_text())[TE]["symbols"]
DRY_RUNGS = ("installation", "attention", "fp8", "big_rank.selective", "big_rank.overlap_graphs")
"""Rungs of the test of whole processes; other rungs of `big_rank` differ in their settings."""
H200_BYTES, UNEVEN = 139 << 30, 1.2
"""Memory of the GPU; tokens of the mirrored experts, relative to the mean."""


def build_setting(folder: Path) -> Setting:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return Setting(folder, dry=True, work=folder / "work")


def get_rung(name: str) -> Rung:
    [rung] = first_contact.choose_rungs(name)
    return rung


@pytest.mark.deep
def test_rungs_pass_in_a_dry_run_and_are_kept(tmp_path: Path) -> None:
    words = [sys.executable, str(GPU / "first_contact.py"), "--out", str(tmp_path), "--dry", "--rungs",
             ",".join(DRY_RUNGS)]
    first, again = (subprocess.run(words, capture_output=True, text=True, check=False) for _ in range(2))
    results = build_setting(tmp_path).read_results()
    assert first.returncode == 0, first.stdout
    assert {rung: result["status"] for rung, result in results.items()} == dict.fromkeys(DRY_RUNGS, PASS)
    errors = results["attention"]["figures"]
    assert all(max(found) < 1e-5 for case, found in errors.items() if "heads" in case)
    functions = results["big_rank.overlap_graphs"]["figures"]["functions"]
    assert any(name.endswith(":replay") for name, _, _ in functions), "no graph was replayed"
    assert [line.split()[1] for line in again.stdout.splitlines() if line.endswith(" kept")] == [*DRY_RUNGS]
    assert "not in a dry run: torch varlen" in first.stdout


def test_the_list_has_minutes_and_the_first_questions_take_ten() -> None:
    lines = first_contact.list_rungs().splitlines()[1:]
    total_minutes = {name: float(total) for _, total, name, *_ in map(str.split, lines)}
    assert list(total_minutes) == [rung.name for rung in RUNGS]
    assert total_minutes["big_rank.fp8_weights"] < 10 < total_minutes["post.gpu"] < 40


def test_rungs_are_chosen_by_name_and_part() -> None:
    names = [rung.name for rung in first_contact.choose_rungs("fp8,losses,losses.cpu,big_rank.recompute")]
    assert names == ["fp8", "losses.cpu", "losses.gpu", "losses.moved", "big_rank.recompute"]
    with pytest.raises(ValueError, match=r"big_rank\.fp9: no rung or part has this name"):
        first_contact.choose_rungs("big_rank.fp9")


def test_a_cut_journal_keeps_finished_rungs_and_figures(tmp_path: Path) -> None:
    setting = build_setting(tmp_path)
    for name in ("fp8", "attention"):
        setting.record("start", name, dry=True, device="CPU")
        setting.record("figure", name, name="error", value=0.5)
    setting.record("end", "fp8", status=PASS, problem="", seconds=1.0)
    with (tmp_path / EVENTS).open("a") as journal:
        journal.write('{"event": "figure", "rung": "atten')  # the machine stopped here
    results = setting.read_results()
    assert [(results[name]["status"], results[name]["figures"]) for name in ("fp8", "attention")] == [
        (PASS, {"error": 0.5}), (CUT, {"error": 0.5})]
    with pytest.raises(Failed, match=r"run losses\.cpu first, or give the journal of its run by --carry"):
        setting.get_figures("losses.cpu")


def test_cpu_rungs_of_another_machine_are_carried_in(tmp_path: Path) -> None:
    home, lent = (build_setting(tmp_path / name) for name in ("home", "lent"))
    for name in ("losses.cpu", "fp8"):
        home.record("start", name, dry=True, device="CPU")
        home.record("figure", name, name="tiny", value=[2.0, 1.5])
        home.record("end", name, status=PASS, problem="", seconds=9.0)
    for _ in range(2):
        first_contact.carry_events(home.out / EVENTS, lent)
    assert lent.get_figures("losses.cpu") == {"tiny": [2.0, 1.5]}
    assert list(lent.read_results()) == ["losses.cpu"], "rungs of the GPU are measured on the lent machine"
    assert len((lent.out / EVENTS).read_text().splitlines()) == 3


def test_no_rung_starts_that_would_exceed_the_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "RungProcess", None)
    rungs = first_contact.choose_rungs("fp8,attention")
    assert first_contact.run_rungs(rungs, build_setting(tmp_path), minutes=0.4) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["LEFT", "fp8"], ["LEFT", "attention"]]


def test_kernels_are_counted_without_the_calls_that_launch_them() -> None:
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(key=key, device_type=kind, self_device_time_total=device, count=count,
                              self_cpu_time_total=host) for key, kind, device, host, count in (
        ("gemm", gpu, 4000, 0, 3), ("cudaLaunchKernel", cpu, 0, 900, 4), ("memcpy", gpu, 1000, 0, 1),
        ("cudaMalloc", cpu, 0, 2500, 1))]
    found = host_time.attribute_events(events)
    assert found["kernels"] == {"all": (5.0, 4), "gemm": (4.0, 3), "memcpy": (1.0, 1)}
    assert list(found["driver calls"].items()) == [
        ("all", (3.4, 5)), ("cudaMalloc", (2.5, 1)), ("cudaLaunchKernel", (0.9, 4))]


def write_library(file: Path, capabilities: Sequence[int]) -> None:
    """Write a library with GPU programs of 64 bytes, as nvcc packs them."""
    entries = b"".join(struct.pack("<HHIQ12xI32x", 2, 0x101, 64, 64, sm) + bytes([sm]) * 64
                       for sm in capabilities)
    header = struct.pack("<IHHQ", parcel.FATBIN, 1, 16, len(entries))
    file.write_bytes(b"\x7fELF code" + header + entries + b"more code")


def test_a_parcel_holds_programs_of_one_gpu_and_survives_the_way(tmp_path: Path) -> None:
    library = tmp_path / "libtransformer_engine.so"
    write_library(library, (80, 90, 100))
    before = library.read_bytes()
    assert parcel.clear_other_programs(library, 90) == 2 * 64
    after = library.read_bytes()
    assert len(after) == len(before) and after.count(bytes([90]) * 64) == 1
    assert [sm for _, _, sm in parcel.find_programs(bytearray(after))] == [80, 90, 100]
    parcel.split(library, tmp_path / "pieces")
    (tmp_path / "pieces/piece-00").write_bytes(before)
    with pytest.raises(SystemExit, match="piece-00: missing or damaged; carry this piece again"):
        parcel.unpack(tmp_path / "pieces", tmp_path / "there")


def run_rungs_here(setting: Setting, *names: str) -> dict[str, Any]:
    """Measure rungs in this process; return the figures of all."""
    for name in names:
        first_contact.run_here(get_rung(name), setting, wait_for_go=False)
    results = setting.read_results()
    assert {name: results[name]["problem"] for name in names} == dict.fromkeys(names, "")
    return {figure: value for name in names for figure, value in results[name]["figures"].items()}


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

    monkeypatch.setattr(Setting, "run_command", command)
    monkeypatch.setattr(Setting, "run_commands", commands)
    monkeypatch.setattr(part_losses, "plan_packing", lambda setting: (packed_data.text, []))
    monkeypatch.setattr(part_losses, "WAYS", {"fp32": part_losses.WAYS["fp32"]})
    monkeypatch.setattr(part_losses, "RECIPES", part_losses.RECIPES[:1])
    setting = build_setting(tmp_path)
    losses = run_rungs_here(setting, "losses.cpu", "losses.gpu", "losses.moved")
    assert losses["tiny-solar-open, fp32"]["routers"] == 2
    assert {losses[name]["worst relative difference"]
            for name in ("tiny-solar-open, fp32", "CPU, GPU, CPU")} == {0.0}
    # files of a failed part do not interfere
    command(setting, *part_losses.build_training_command(
        setting, "tiny-solar-open", setting.work / "staying", 1, *part_losses.SMALL))
    again = part_losses.read_losses(setting.work / "staying")
    assert again == losses["tiny-solar-open, fp32"]["gpu"][:1]
    monkeypatch.setattr(part_post, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(part_post, "NUMBERS", 16)
    monkeypatch.setattr(part_post, "plan_packing", part_losses.plan_packing)
    (setting.work / "tokenizer").symlink_to(packed_data.tokenizer)
    behind = run_rungs_here(setting, "post.cpu", "post.gpu")["fp32"]
    assert behind.pop("same responses") == "32 of 32" and len(behind.pop("losses of rounds")) == 2
    assert behind == dict.fromkeys(part_post.STAGES, 0.0)
    figures = dict(part_transfers.measure(setting))
    assert all(value > 0 for value in figures.values() if isinstance(value, (int, float)))
    assert len(figures) == 9


@pytest.mark.each("name", CASES)
def test_big_rank_uses_settings_that_training_accepts_and_fits_an_h200(name: str) -> None:
    config = apply_settings(recipes.get(RECIPE), [*LAYOUT, *CASES[name].settings])
    # the global batch of so many processes is not measured
    assert [p for p in config.problems(NUM_RANKS) if "global_batch_size" not in p.key] == [], name
    assert name in {rung.case for rung in RUNGS}
    assert build_account(config, NUM_RANKS, 0, 4096, UNEVEN).total < H200_BYTES, name


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
    assert find_largest([1.0, 3.0, 2.0]) == 3
    assert math.isnan(find_largest([1.0, nan])) and math.isnan(find_largest([nan, 1.0]))
    setting = build_setting(tmp_path)
    monkeypatch.setattr(part_fp8, "compare_products", lambda *_: {"fprop": 0.01, "dgrad": nan, "wgrad": 0.01})
    figures: dict[str, Any] = {}
    with pytest.raises(Failed, match="tensorwise: products differ from their emulation"):
        figures.update(part_fp8.measure(setting))
    monkeypatch.setattr(part_losses, "read_losses", lambda run: [1.0, nan])
    monkeypatch.setattr(part_losses, "read_routers", lambda run, step: {"router": torch.tensor(float(step))})
    _, [problem] = part_losses.Comparison("tiny-solar-open", "fp32").figures(setting, 2, [1.0, 1.0])
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
        while timeout == 7.0 and not build_setting(tmp_path).read_results().get("fp8", {}).get("figures"):
            time.sleep(0.01)
        return waited_for(process, 0.0 if timeout == 7.0 else timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    setting = build_setting(tmp_path)
    first_contact.RungProcess(get_rung("fp8"), setting).run(7.0)
    result = setting.read_results()["fp8"]
    assert (result["status"], result["problem"]) == ("FAIL", "not done within 7 s")
    assert ends(result["figures"]["child"])

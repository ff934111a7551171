"""`megatron-sov doctor`: exit codes and output."""

import json
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.commands.operate.doctor import checks as doctor, gpu_checks
from megatron_sov.commands.operate.doctor.checks import MachineCheck

GOOD = [MachineCheck("Python", "ok", "3.11.7"), MachineCheck("GPU", "missing", "torch is a CPU build"),
        MachineCheck("Disk", "warning", "1.0 GB free", "free some")]
BAD = [*GOOD, MachineCheck("torch", "broken", "cannot be imported", "make setup")]


@pytest.mark.parametrize(("found", "code"), [(GOOD, 0), (BAD, 2)])
def test_only_broken_installations_fail(found: list[MachineCheck], code: int, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda: found)
    assert cli.main(["doctor", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["works"] is (code == 0)
    assert [MachineCheck(**check) for check in printed["checks"]] == found


def test_text_aligns_and_puts_the_remedy_under_its_check() -> None:
    assert doctor.format_checks(BAD).splitlines() == [
        "ok       Python  3.11.7",
        "missing  GPU     torch is a CPU build",
        "warning  Disk    1.0 GB free",
        "                 -> free some",
        "broken   torch   cannot be imported",
        "                 -> make setup",
    ]


def test_this_machine_can_train(read_output: Any) -> None:
    """The test machine can train, so every group of checks must work and report nothing broken."""
    printed = read_output("doctor")
    assert "This machine can train." in printed
    for name in ("Python", "torch", "gloo", "Transformer Engine", "Slurm", "CPU cores", "Disk"):
        assert name in printed


@pytest.mark.each(("has_gpu", "installed", "broken", "line"), [
    (True, True, "deepep", "dispatchers: [alltoall, allgather, hybridep]"),
    (True, False, "", "dispatchers: [alltoall, allgather]"),
    (False, True, "", "its dispatchers are those of a GPU node")])
def test_the_line_for_a_cluster_profile(has_gpu: bool, installed: bool, broken: str, line: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_checks, "has_gpu", lambda: has_gpu)
        patch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: installed or None)
        patch.setattr(gpu_checks, "find_deep_ep_problem", lambda name: "ImportError" * (name == broken))
        (check,) = gpu_checks.iter_profile_checks()
    assert check.detail == line


def test_missing_compiler_and_ninja_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(gpu_checks, "has_gpu", lambda: True)
    (check,) = gpu_checks.iter_compiler_checks()
    assert check.status == "warning" and "no c++ and no ninja in PATH" in check.detail
    assert "apt-get install" in check.remedy

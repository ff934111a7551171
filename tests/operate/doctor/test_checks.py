"""Checks of `doctor` on simulated machines: with and without GPUs, packages, programs and libraries."""

import importlib.metadata
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.doctor import checks as doctor, gpu_checks
from megatron_sov.commands.operate.doctor.checks import MachineCheck
from megatron_sov.operate import contract


def write_package(folder: Path, name: str, text: str = "", **subpackages: str) -> None:
    """Write a package with this source, and subpackages by name, into a folder."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    for subpackage, content in subpackages.items():
        (folder / name / subpackage).mkdir()
        (folder / name / subpackage / "__init__.py").write_text(content)


def write_program(folder: Path, name: str, text: str) -> None:
    """Write an executable shell script into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in the import path; modules imported from it are forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n, m in sys.modules.items()
                 if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


def test_a_missing_library_is_broken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {c.name: c.status for c in doctor.iter_package_checks()} == dict.fromkeys(
        doctor.REQUIRED_PACKAGES, "ok")
    monkeypatch.setattr(doctor, "REQUIRED_PACKAGES", ("numpy", "no-such-library"))
    assert [(c.name, c.status) for c in doctor.iter_package_checks()] == [
        ("numpy", "ok"), ("no-such-library", "broken")]


def test_a_foreign_package_that_is_imported_in_our_place_is_broken(site: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert {c.status for c in doctor.iter_shadow_checks()} == {"ok"}
    write_package(site, "tokenizer")
    monkeypatch.delitem(sys.modules, "tokenizer", raising=False)
    found = {c.name: c for c in doctor.iter_shadow_checks()}
    assert found["data_prep"].status == "ok"
    assert found["tokenizer"].status == "broken"
    assert str(site / "tokenizer") in found["tokenizer"].detail
    monkeypatch.setattr(importlib.metadata, "packages_distributions",
                        lambda: {"tokenizer": ["other-tokenizer"]})
    remedies = {c.name: c.remedy for c in doctor.iter_shadow_checks()}
    assert remedies["tokenizer"] == "pip uninstall other-tokenizer"


def test_a_foreign_distribution_that_owns_our_name_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"data_prep": ["megatron-sov", "prep-tools"], "tokenizer": ["megatron-sov"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    found = {c.name: c.status for c in doctor.iter_shadow_checks()}
    assert found == {"megatron_sov": "ok", "tokenizer": "ok", "data_prep": "warning", "slurm": "ok",
                     "layout_proof": "ok"}


def test_torch_without_gpu_works_on_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {c.name: c.status for c in doctor.iter_torch_checks()}
    assert found == {"torch": "ok", "gloo": "ok", "GPU": "missing"}
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert {c.name: c.status for c in doctor.iter_torch_checks()}["gloo"] == "broken"


def test_gpus_are_listed_with_memory_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = namedtuple("gpu", "name total_memory major minor")("Test GPU", 141 * 2**30, 9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    found = {c.name: c for c in doctor.iter_torch_checks()}
    assert found["GPU 1"].detail == "Test GPU, 141 GiB, compute capability 9.0"
    assert found["NCCL"].status == "broken"


def test_a_torch_that_does_not_load_is_broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "torch.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (check,) = doctor.iter_torch_checks()
    assert check.status == "broken"
    assert check.detail == "cannot be imported (OSError: libcudart.so: cannot open shared object file)"


@pytest.mark.parametrize(("text", "status", "detail"), [
    ("", "ok", "imports"),
    ("raise RuntimeError('Found empty `transformer-engine` meta package installed.\\nmore')", "warning",
     "is installed but does not import (RuntimeError: Found empty `transformer-engine` meta "
     "package installed.)"),
    ("raise OSError", "warning", "is installed but does not import (OSError: no message)"),
])
def test_transformer_engine_counts_if_it_imports(site: Path, text: str, status: str, detail: str) -> None:
    write_package(site, "transformer_engine", pytorch=text)
    assert [(c.status, c.detail) for c in doctor.iter_transformer_engine_checks()] == [(status, detail)]


def test_signatures_are_compared_with_those_that_this_project_calls(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    assert [contract.find_first_difference(name)[1] for name in ("megatron.core", "torch")] == ["", ""]
    (tmp_path / "engine_double").mkdir()
    expected = {"f": "a, *, b=1", "A": "", "A.g": "self, x"}
    (tmp_path / "contract.json").write_text(json.dumps(
        {"engine_double": {"version": "2", "files": {"engine_double/__init__.py": expected}}}))
    monkeypatch.setattr(contract, "CONTRACT", tmp_path / "contract.json")
    monkeypatch.setattr(doctor, "CONTRACT_LIBRARIES", {"engine_double": "engine-double"})
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    problems = []
    for text in ("try:\n    def f(a: int, *, b: int = 1): ...\nfinally: 0\nclass A:\n    def g(self, x): ...",
                 "def f(a, *, b=2): ...", "def f(a, *, b=1): ...\nclass A: ..."):
        (tmp_path / "engine_double/__init__.py").write_text(text)
        problems.append(get_only(doctor.iter_contract_checks()).detail)
    differs = "engine-double 1 differs from 2, which this project supports: "
    assert problems == ["engine-double: the signatures match",
                        f"{differs}f of engine_double/__init__.py takes (a, *, b=2), not (a, *, b=1)",
                        f"{differs}A.g of engine_double/__init__.py is gone"]
    (tmp_path / "engine_double/__init__.py").write_text("(")
    assert " cannot be read (SyntaxError: " in get_only(doctor.iter_contract_checks()).detail


def test_signatures_are_read_from_every_folder_of_a_namespace_package(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for distribution, file in (("bridge", "extra.py"), ("core", "needed.py")):
        (tmp_path / distribution / "shared_double").mkdir(parents=True)
        (tmp_path / distribution / "shared_double" / file).write_text("def f(a): ...")
        monkeypatch.syspath_prepend(str(tmp_path / distribution))
    monkeypatch.setattr(contract, "CONTRACT", tmp_path / "contract.json")
    for file, problem in (("extra", ""), ("needed", ""), ("absent", "shared_double/absent.py is gone")):
        (tmp_path / "contract.json").write_text(json.dumps(
            {"shared_double": {"version": "2", "files": {f"shared_double/{file}.py": {"f": "a"}}}}))
        assert contract.find_first_difference("shared_double") == ("2", problem)


def test_a_machine_with_gpus_cannot_train_without_transformer_engine(site: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    write_package(site, "transformer_engine", pytorch="raise OSError('libcublas.so.13: cannot open')")
    assert [(c.status, c.detail) for c in doctor.iter_transformer_engine_checks()] == [
        ("broken", "is installed but does not import (OSError: libcublas.so.13: cannot open)")]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert get_only(doctor.iter_transformer_engine_checks()).status == "broken"


@pytest.mark.parametrize(("loaded", "status"), [((9, 14, 0), "warning"), ((9, 19, 0), "ok")])
def test_two_cudnn_versions_in_one_process_are_reported(site: Path, monkeypatch: pytest.MonkeyPatch,
                                                        loaded: tuple[int, ...], status: str) -> None:
    """On an H200, cuDNN of the system and cuDNN of torch's environment gave `SUBLIBRARY_LOADING_FAILED`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    write_package(site, "transformer_engine", pytorch=f"def get_cudnn_version(): return {loaded}")
    check = get_only(doctor.iter_transformer_engine_checks())
    assert check.status == status
    if status == "warning":
        assert "has loaded cuDNN 9.14.0, and torch 9.19.0" in check.detail and "CUDNN_HOME" in check.remedy


@pytest.mark.parametrize(("gpu", "text", "status", "detail"), [
    (False, "", "missing", "no recipe works: this machine has no GPU"),
    (True, "raise OSError", "missing", "no recipe works: Transformer Engine does not work"),
    # as on Hopper GPUs
    (True, "def yes(return_reason): return True, ''\n"
           "def no(return_reason): return False, 'Device compute capability 10.0+ required.'\n"
           "is_fp8_available = is_fp8_block_scaling_available = yes\n"
           "is_mxfp8_available = is_nvfp4_available = no",
     "ok", "tensorwise, blockwise; not mxfp8 (Device compute capability 10.0+ required.); "
           "not nvfp4 (Device compute capability 10.0+ required.)")])
def test_the_recipes_that_the_gpu_can_take_are_listed(site: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool,
                                                      text: str, status: str, detail: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    write_package(site, "transformer_engine", pytorch=text)
    check = get_only(gpu_checks.iter_quantization_checks())
    assert (check.name, check.status, check.detail) == ("train.fp8", status, detail)


def get_only(checks) -> MachineCheck:
    """Return the check of an iterator that yields one."""
    (check,) = checks
    return check


def test_program_versions_are_read_from_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert get_only(doctor.iter_slurm_checks()).status == "missing"
    write_program(tmp_path, "sbatch", "echo slurm 24.11.1")
    assert get_only(doctor.iter_slurm_checks()) == MachineCheck("Slurm", "ok", "slurm 24.11.1")


def test_sandbox_support_is_detected_by_running_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    check = get_only(doctor.iter_sandbox_checks())
    assert (check.status, check.detail.partition(":")[0]) in (
        ("ok", "namespaces"), ("ok", "landlock"), ("missing", "this machine cannot isolate a program"))

    def refuse() -> str:
        raise UserError("none: 2 problems\n  namespaces: not allowed\n  landlock: version 0")

    monkeypatch.setattr(doctor, "detect_enclosure", refuse)
    check = get_only(doctor.iter_sandbox_checks())
    assert check.status == "missing" and "namespaces: not allowed; landlock: version 0" in check.detail


def test_little_disk_is_a_warning_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    disk = {c.name: c for c in doctor.iter_resource_checks()}["Disk"]
    assert (disk.status, disk.detail) == ("warning", "1.0 GB free, less than the 5 GB that the demo needs")

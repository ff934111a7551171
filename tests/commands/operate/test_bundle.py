"""Bundles of a small project with our shape: what is gathered is installed on a machine without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sov import cli
from megatron_sov.base.artifacts import damaged_files, new_artifact, read_manifest
from megatron_sov.operate.bundle import check

pytest.importorskip("setuptools", minversion="77")

PYTHON = ".".join(map(str, sys.version_info[:2]))
NO_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]
SETUP = """
from setuptools import setup
setup(name="megatron-sov", version="1.0", packages=["megatron_sov"], install_requires=["sovlight"],
      extras_require={"more": ["sovmore"], "unpinned": ["sovabsent"]},
      entry_points={"console_scripts": ["megatron-sov=megatron_sov:main"]})
"""


def write_wheel(folder: Path, name: str, version: str) -> None:
    """Write a wheel of one module, for any platform."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL",
                         "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD",
                         "".join(f"{n},,\n" for n in [*archive.namelist(), f"{info}/RECORD"]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with our name, which needs `sovlight` and, as an extra, `sovmore`;
    pip finds their wheels in a folder alone."""
    root = tmp_path_factory.mktemp("bundle")
    (root / "index").mkdir()
    for name, version in (("sovlight", "1.0"), ("sovlight", "2.0"), ("sovmore", "1.0")):
        write_wheel(root / "index", name, version)
    source = root / "source"
    (source / "megatron_sov").mkdir(parents=True)
    (source / "megatron_sov/__init__.py").write_text("import sovlight\ndef main():\n    print('runs with', "
                                                     "sovlight.VERSION)\n")
    (source / "setup.py").write_text(SETUP)
    (source / "constraints.txt").write_text("# pinned\nsovlight==1.0\nsovmore==1.0\n")
    (source / "runs").mkdir()
    (source / "runs" / "huge").write_text("not code")
    return source


@pytest.fixture(autouse=True)
def only_the_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.parent / "index"))


def bundle(source: Path, output: Path, *arguments: str) -> int:
    return cli.main(["bundle", "--source", str(source), "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an extra and a tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    with new_artifact(folder / "tokenizer", "tokenizer") as writer:
        (writer.path / "tokenizer.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(source.parent / "index"))
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        assert bundle(source, folder / "bundle", "--extra", "more", "--with", str(folder / "tokenizer")) == 0
    return folder / "bundle"


def test_a_bundle_holds_pinned_wheels_and_folders_with_hashes(made: Path, source: Path) -> None:
    manifest = read_manifest(made, "bundle")
    wheels = sorted(p.name.partition("-py3")[0] for p in (made / "wheels").iterdir())
    assert wheels == ["megatron_sov-1.0", "sovlight-1.0", "sovmore-1.0"]
    assert manifest.content["python"] == PYTHON and manifest.content["wheels"] == 3
    assert (made / "requirements.txt").read_text() == "megatron_sov[more]==1.0\n"
    assert manifest.inputs[0]["kind"] == "tokenizer" and "folders/tokenizer/tokenizer.json" in manifest.files
    assert damaged_files(made) == [] and check.problems(made) == []
    # nothing is left beside the sources
    assert not (source / "build").exists() and not list(source.glob("*.egg-info"))


@pytest.mark.deep
def test_it_is_installed_without_a_network(made: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(made, tmp_path / "a copy")
    no_network = NO_NETWORK if subprocess.run([*NO_NETWORK, "true"], capture_output=True,
                                              check=False).returncode == 0 else []
    environment = ({k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
                   | {"PYTHON": sys.executable})
    command = ["sh", str(moved / "install.sh"), str(tmp_path / "env")]
    done = subprocess.run([*no_network, *command], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"{tmp_path}/env: installed; {tmp_path}/env/bin/megatron-sov doctor says what "
                           "this machine has\n")
    ran = subprocess.run([tmp_path / "env/bin/megatron-sov"], env=environment, capture_output=True,
                         text=True, check=True)
    assert ran.stdout == "runs with 1.0\n"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == f"error: {command[-1]} exists already; name a folder that does not exist yet\n"


def test_damage_and_another_machine_stop_it_before_anything_is_made(made: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(made, tmp_path / "copy")
    wheel = next((moved / "wheels").glob("sovlight*"))
    wheel.write_bytes(wheel.read_bytes()[:-1])
    done = subprocess.run(["sh", str(moved / "install.sh"), str(tmp_path / "env")],
                          env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, f"error: {wheel}: differs from its hash; copy the bundle again\n")
    assert not (tmp_path / "env").exists()
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["content"] |= {"python": "2.7", "machine": "vax"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert [text.partition(",")[0] for text in check.problems(moved)] == [
        "the bundle is for Python 2.7", "the bundle is for vax"]


@pytest.mark.parametrize(("name", "python", "said"), [
    ("", sys.executable, "'' names no folder for the environment; write ./NAME"),
    ("-env", sys.executable, "'-env' names no folder for the environment; write ./NAME"),
    ("link", sys.executable, "link exists already; name a folder that does not exist yet"),
    ("env", "/no/python", "/no/python is no program; name a Python with PYTHON=/path/to/python"),
])
def test_what_cannot_be_an_environment_is_one_sentence_and_changes_nothing(
        made: Path, tmp_path: Path, name: str, python: str, said: str) -> None:
    """An empty name, of a variable that is not set, would be the system's own /bin."""
    (tmp_path / "link").symlink_to("nowhere")
    done = subprocess.run(["sh", str(made / "install.sh"), name], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHON": python}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("manifest", ['{"a"', "{}", "[]", '{"content": {"python": "3", "machine": ""}}'])
def test_a_torn_manifest_is_one_sentence(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (said,) = check.problems(tmp_path)
    assert said.startswith(f"{tmp_path}/manifest.json: cannot be read (") and said.endswith(
        "; copy the bundle again")
    assert len(check.problems(tmp_path / "missing")) == 1


def test_an_installation_that_fails_leaves_nothing_in_the_way_of_the_next(made: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"  # takes the bundle, makes an environment, and its pip fails
    python.write_text('#!/bin/sh\n[ "$1" != -I ] || exit 0\nmkdir -p "$3/bin"\n'
                      'printf "#!/bin/sh\\ntouch %s/tried\\nexit 1\\n" "${3%/*}" > "$3/bin/python"\n'
                      'chmod +x "$3/bin/python"\n')
    python.chmod(0o755)
    done = subprocess.run(["sh", str(made / "install.sh"), str(tmp_path / "env")], env=os.environ
                          | {"PYTHON": str(python)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and (tmp_path / "tried").exists() and not (tmp_path / "env").exists()


@pytest.mark.deep
def test_another_python_and_platform_get_their_own_wheels(source: Path, tmp_path: Path) -> None:
    arguments = ["--python", "3.13", "--platform", "manylinux_2_28_aarch64"]
    assert bundle(source, tmp_path / "bundle", *arguments) == 0  # these wheels are for any platform
    content = read_manifest(tmp_path / "bundle").content
    assert (content["python"], content["machine"], content["platforms"]) == (
        "3.13", "aarch64", ["manylinux_2_28_aarch64"])


@pytest.mark.deep
@pytest.mark.parametrize(("arguments", "says"), [
    (["--with", "nowhere"], "--with nowhere: is no folder"),
    (["--python", "3"], "--python 3: must be two numbers"),
    (["--extra", "mroe"], "--extra mroe: does not exist; did you mean 'more'? (extras: more, unpinned)"),
    (["--extra", "unpinned"], "pip download: No matching distribution found for sovabsent"),
])
def test_mistakes_are_one_sentence_and_leave_nothing(source: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str], arguments: list[str],
                                                     says: str) -> None:
    assert bundle(source, tmp_path / "bundle", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_pins_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle(tmp_path, tmp_path / "out") == 2
    assert "has no setup.py; pass a checkout" in capsys.readouterr().err

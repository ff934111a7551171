"""Container definitions: both build the same image from the repository, with the versions of
constraints.txt."""

import os
import re
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKER = (ROOT / "containers/Dockerfile").read_text()
APPTAINER = (ROOT / "containers/megatron-sov.def").read_text()
INSTALL = "sh /opt/megatron-sov/containers/install.sh"
RECORDER = """#!/bin/sh
case $1 in
  -c) echo "torch==2.13.0a0+nv26.07" ;;
  *) printf '%s\\n' "$@" > "$RECORD/arguments"
     cp "$6" "$RECORD/pins"
     printf '%s' "${PIP_CONSTRAINT:-unset}" > "$RECORD/constraint" ;;
esac
"""


def list_copied_files(lines: list[str]) -> dict[str, str]:
    """Return source -> destination of files that a definition copies into the image."""
    found = {}
    for line in lines:
        *sources, place = line.split()
        found |= {name: place + name if place.endswith("/") else place for name in sources}
    return found


def docker_copies() -> dict[str, str]:
    return list_copied_files(re.findall(r"^COPY (.+)$", DOCKER, re.MULTILINE))


def test_both_definitions_name_one_pinned_image_and_do_the_same() -> None:
    (docker_base,) = re.findall(r"^FROM (\S+)$", DOCKER, re.MULTILINE)
    (apptainer_base,) = re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE)
    assert docker_base == apptainer_base
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", docker_base)
    files = APPTAINER.partition("%files\n")[2].partition("\n\n")[0].splitlines()
    assert docker_copies() == list_copied_files(files)
    assert f"RUN DEEPEP_ARCH=$DEEPEP_ARCH {INSTALL}\n" in DOCKER and f"%post\n    {INSTALL}\n" in APPTAINER


def test_all_that_setup_needs_is_copied() -> None:
    places = docker_copies()
    assert {name for name in places if not (ROOT / name).exists()} == set()
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"}
    expected = {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE",
                "containers/install.sh"} | packages
    assert places == {name: f"/opt/megatron-sov/{name}" for name in expected}


def test_container_pins_equal_the_repository_except_torch(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PYTHON": str(python), "RECORD": str(tmp_path),
                                "PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    subprocess.run(["sh", str(ROOT / "containers/install.sh")], env=environment, check=True)
    *options, source = (tmp_path / "arguments").read_text().splitlines()
    assert options[:4] == ["-m", "pip", "install", "--no-cache-dir"] and source == str(ROOT)
    ours = [line for line in (ROOT / "constraints.txt").read_text().splitlines()
            if not line.startswith("torch==")]
    assert (tmp_path / "pins").read_text().splitlines() == [*ours, "torch==2.13.0a0+nv26.07"]
    assert (tmp_path / "constraint").read_text() == "unset"


def test_every_dependency_of_setup_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {(re.sub(r"[-_.]+", "-", pin.name).lower(), str(pin.marker)): str(pin.specifier)[2:]
              for pin in pins}
    listed = re.search(r"^INSTALL_REQUIRES = \[\n(.*?)^\]", (ROOT / "setup.py").read_text(),
                       re.MULTILINE | re.DOTALL)
    assert listed is not None
    needs = [Requirement(text) for text in re.findall(r'"([^"]+)"', listed[1])]
    assert len(needs) > 10
    for need in needs:
        assert need.specifier.contains(pinned[re.sub(r"[-_.]+", "-", need.name).lower(), str(need.marker)]), (
            f"{need}: constraints.txt disagrees")

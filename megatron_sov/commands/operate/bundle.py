"""`megatron-sov bundle --output DIR [--python X.Y] [--platform TAG] [--extra NAME] [--with DIR]`: what a
cluster without a network needs, our code and all that it depends on as wheels, and folders of the user's.

    BUNDLE/wheels/            our wheel and every dependency's, at the versions of constraints.txt
    BUNDLE/folders/<name>/    tokenizers, Hugging Face folders, checkpoints
    BUNDLE/install.sh         makes an environment from it; check.py compares every file with
                              manifest.json before
"""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import megatron_sov
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.outputs import refuse_link_outside
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions

if TYPE_CHECKING:
    from megatron_sov.base.artifacts import Manifest

KIND = "bundle"
SCRIPTS = ("install.sh", "check.py")
CONSTRAINTS = "constraints.txt"
WHEELS, FOLDERS = "wheels", "folders"


@dataclass(frozen=True)
class Bundle:
    """What is to be gathered, for which machine."""

    source: Path
    """Folder with setup.py and constraints.txt."""
    python: str = ""
    """Version of Python there, e.g. 3.12; empty: this one's."""
    platforms: tuple[str, ...] = ()
    """Platform tags of wheels that run there, e.g. manylinux_2_28_x86_64; empty: this machine's."""
    extras: tuple[str, ...] = ()
    """Optional parts of our package."""
    folders: tuple[Path, ...] = ()
    """Folders that go along."""

    @property
    def python_version(self) -> str:
        """Version of Python that the wheels are for."""
        return self.python or ".".join(map(str, sys.version_info[:2]))

    @property
    def machine(self) -> str:
        """Architecture that the wheels are for, as `uname -m` says it."""
        if not self.platforms:
            return platform.machine()
        known = ("x86_64", "aarch64", "ppc64le", "s390x", "armv7l", "i686")
        return next((name for name in known if self.platforms[0].endswith(name)), platform.machine())

    def check(self) -> None:
        """Raise `UserError` where something is not there, damaged, or has the name of another folder."""
        from megatron_sov.base.artifacts import MANIFEST, damaged_files

        for name in ("setup.py", CONSTRAINTS):
            if not (self.source / name).is_file():
                raise UserError(f"--source {self.source}: has no {name}; pass a checkout of megatron-sov")
        parts = self.python_version.split(".")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise UserError(f"--python {self.python}: must be two numbers, e.g. 3.12")
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"--with {folder}: is no folder; pass a tokenizer, "
                                "a Hugging Face folder or a checkpoint")
            # here and not over there, where nothing could be fetched again
            if (folder / MANIFEST).is_file() and (damage := damaged_files(folder, workers=2)):
                raise UserError(f"--with {damage[0]}; make it again, or restore it from a copy")
        twice = [name for name, count in Counter(folder.resolve().name for folder in self.folders).items()
                 if count > 1]
        # they would be copied into one folder
        if twice:
            raise UserError(f"--with: two folders are named {twice[0]}; rename one of them")


def own_source() -> Path:
    """Return the folder that this code was installed from, where it is a checkout."""
    return Path(megatron_sov.__file__).parents[1]


def gather(bundle: Bundle, output: Path, *, overwrite: bool = False) -> Manifest:
    """Write the bundle and return its manifest.

    pip gets what it needs from wherever its own settings (PIP_*, pip.conf) say.

    Raises:
        UserError: something is missing or damaged, pip cannot find a wheel, or `output` may not be replaced.
    """
    from megatron_sov.base.artifacts import (
        MANIFEST, disk_errors, new_artifact, read_manifest, refuse_existing)
    from megatron_sov.base.digests import SHA256

    # before pip, which may load gigabytes
    refuse_existing(output, KIND, overwrite)
    bundle.check()
    with new_artifact(output, KIND, overwrite=overwrite) as writer:
        writer.algorithm = SHA256  # check.py has nothing but Python's own library
        wheels = writer.path / WHEELS
        wheels.mkdir()
        # our own wheel first: its metadata says which others are needed
        own = _build(bundle.source, wheels)
        _refuse_unknown_extras(own, bundle.extras)
        shutil.copyfile(bundle.source / CONSTRAINTS, writer.path / CONSTRAINTS)
        _download(bundle, own, writer.path)
        for folder in bundle.folders:
            for path in folder.rglob("*"):
                refuse_link_outside(folder, path)
            with disk_errors(writer.path):
                shutil.copytree(folder, writer.path / FOLDERS / folder.resolve().name)
            if (folder / MANIFEST).is_file():
                writer.add_input(folder, leaves=True)
        for name in SCRIPTS:
            (writer.path / name).write_bytes(
                importlib.resources.files("megatron_sov.operate.bundle").joinpath(name).read_bytes())
        name, version = own.name.split("-")[:2]
        extras = f"[{','.join(bundle.extras)}]" if bundle.extras else ""
        (writer.path / "requirements.txt").write_text(f"{name}{extras}=={version}\n")
        (writer.path / "python-version").write_text(f"{bundle.python_version}\n")
        writer.content = {"python": bundle.python_version, "machine": bundle.machine,
                          "platforms": list(bundle.platforms), "extras": list(bundle.extras),
                          "version": version, "wheels": len(list(wheels.iterdir())),
                          "folders": [folder.resolve().name for folder in bundle.folders]}
    return read_manifest(output, KIND)


def _build(source: Path, wheels: Path) -> Path:
    """Build our wheel from a copy of the sources, so that nothing is written beside them."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        copy.mkdir()
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, copy / path.name)
            elif (path / "__init__.py").is_file():
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        # where setuptools is here already, a build needs nothing else
        isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
        # without the others: `_download` takes those that fit the other machine
        _pip("wheel", "--no-deps", *isolation, "--wheel-dir", str(wheels), str(copy))
    (own,) = wheels.glob("*.whl")
    return own


def _refuse_unknown_extras(own: Path, extras: tuple[str, ...]) -> None:
    """Raise `UserError` where our wheel has no such extra; pip itself only warns."""
    with zipfile.ZipFile(own) as archive:
        metadata = archive.read(next(name for name in archive.namelist()
                                     if name.endswith(".dist-info/METADATA"))).decode()
    known = re.findall(r"^Provides-Extra: (\S+)", metadata, re.MULTILINE)
    for extra in extras:
        if extra not in known:
            raise UserError(f"--extra {extra}: does not exist{nearest(extra, known)} (extras: "
                            f"{', '.join(known)})")


def _download(bundle: Bundle, own: Path, folder: Path) -> None:
    chosen = [f"--platform={name}" for name in bundle.platforms]
    if bundle.python or bundle.platforms:
        chosen += [f"--python-version={bundle.python_version}", "--implementation=cp"]
    extras = f"[{','.join(bundle.extras)}]" if bundle.extras else ""
    # no sources: the other machine may have neither compiler nor network to build them
    _pip("download", "--only-binary=:all:", *chosen, "--constraint", str(folder / CONSTRAINTS), "--dest",
         str(own.parent), f"{own}{extras}")


def _pip(*arguments: str) -> None:
    command: Sequence[str] = (sys.executable, "-m", "pip", "--quiet", "--no-input",
                              "--disable-pip-version-check", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = (said or done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"pip {arguments[0]}: {why}; look at the versions in {CONSTRAINTS}, "
                        "--python and --platform, or at where pip's settings make it look")


@dataclass(frozen=True, kw_only=True)
class BundleOptions(OverwriteOptions):
    """Collect what an installation without a network needs."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write."""
    python: Annotated[str, Flag(value="X.Y")] = ""
    """Version of Python over there (default: this one's)."""
    platform: Annotated[tuple[str, ...], Flag(value="TAG")] = ()
    """Platform tag of wheels that run there, e.g. manylinux_2_28_x86_64; several in order of preference
    (default: this machine's)."""
    extra: Annotated[tuple[str, ...], Flag(value="NAME")] = ()
    """Optional part to take along, e.g. dev."""
    folders: Annotated[tuple[Path, ...], Flag("--with", "DIR")] = ()
    """Tokenizer, Hugging Face folder or checkpoint to take along."""
    source: Annotated[Path | None, Flag(value="DIR")] = None
    """Checkout of megatron-sov (default: what this command runs from)."""


add_arguments = partial(add_options, cls=BundleOptions)


def run(typed: argparse.Namespace) -> int:
    """Gather the bundle and say how it is installed.

    Raises:
        UserError: something is missing, or pip cannot find a wheel.
    """
    args = read_options(BundleOptions, typed)

    bundle = Bundle(args.source or own_source(), args.python, args.platform, args.extra,
                    args.folders)
    manifest = gather(bundle, args.output, overwrite=args.overwrite)
    num_bytes = sum(record.size_bytes for record in manifest.files.values())
    print(f"{args.output}: {manifest.content['wheels']} wheels for Python {bundle.python_version} on "
          f"{bundle.machine}, {num_bytes / 1e6:,.0f} MB; copy it, then: "
          f"sh {args.output.name}/install.sh ENVIRONMENT")
    return 0

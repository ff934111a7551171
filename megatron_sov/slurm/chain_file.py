"""Chain files: several stages, one after the other, as YAML; those of the package by name,
a user's own by path.

`$WORK` in the arguments of a stage stands for the folder that the variable of that name holds.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.errors import UserError, nearest
from megatron_sov.settings import AtLeastOne, NotNegativeInt, read_text, read_yaml

WORK = re.compile(r"\$WORK\b|\$\{WORK\}")


@dataclass(frozen=True)
class ChainStage:
    """One stage of a chain file."""

    stage: str
    """Which stage."""
    arguments: str
    """What follows its command, quoted as in a shell."""
    name: str = ""
    """Its name in the chain; empty: the stage's."""
    after: tuple[str, ...] | None = None
    """Names of the stages that have to be complete; null: the one before."""
    cluster: str = ""
    """Profile; empty: the chain's."""
    nodes: AtLeastOne = 1
    """Nodes of a training stage."""
    min_nodes: NotNegativeInt = 0
    """Fewest nodes to go on with; 0: all."""
    nodes_set: tuple[str, ...] = ()
    """N:key=value: settings that change when there are N nodes."""
    array: NotNegativeInt = 0
    """data pack: tasks that share the inputs."""
    time_limit: str | None = None
    """Time limit instead of the profile's."""
    note: str = ""
    """What people should know before they submit its ready script."""

    @property
    def label(self) -> str:
        """Its name in the chain."""
        return self.name or self.stage

    def argv(self, work: str | None) -> tuple[str, ...]:
        """Return the arguments as a shell would split them.

        Args:
            work: what `$WORK` stands for; None: what the environment says.

        Raises:
            UserError: quotes do not match, or $WORK is used and not set.
        """
        try:
            argv = shlex.split(self.arguments, comments=True)
        except ValueError as e:
            raise UserError(f"arguments = {self.arguments!r}: cannot be read as a shell would ({e}); "
                            "mend its quotes") from None
        return tuple(WORK.sub(lambda found: work_folder() if work is None else work, word) for word in argv)


@dataclass(frozen=True)
class ChainConfig:
    """A chain file."""

    stages: tuple[ChainStage, ...]
    """In order."""
    cluster: str = ""
    """Profile of all stages; empty: --cluster."""
    description: str = ""
    """One line for people."""


def work_folder() -> str:
    """Return the folder of $WORK, absolute.

    Raises:
        UserError: it is not set.
    """
    if not os.environ.get("WORK"):
        raise UserError("$WORK is not set; export WORK=FOLDER, a folder on a disk that all nodes see")
    return str(Path(os.environ["WORK"]).absolute())


def names() -> list[str]:
    """Return the names of the chains that come with the package."""
    folder = importlib.resources.files("slurm").joinpath("chains")
    return sorted(entry.name.removesuffix(".yaml")
                  for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_chain(name: str) -> ChainConfig:
    """Read a chain: one that comes with the package, or a YAML file of the user's.

    Raises:
        UserError: it is not there, is no YAML, has other fields, or stages that cannot be
            one after the other.
    """
    if name in names():
        text = importlib.resources.files("slurm").joinpath("chains", f"{name}.yaml").read_text(
            encoding="utf-8")
    elif Path(name).is_file():
        text = read_text(Path(name), name)
    else:
        raise UserError(f"{name}: does not exist{nearest(name, names())} (chains: {', '.join(names())}; "
                        "your own: a YAML file with `stages`, docs/slurm.md)")
    config = read_yaml(ChainConfig, text, name, rules=False)
    if not config.stages:
        raise UserError(f"{name}: has no stages")
    labels = [stage.label for stage in config.stages]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"{name}: {twice[0]!r} names two stages; give one of them another `name`")
    for number, stage in enumerate(config.stages):
        for before in stage.after or ():
            if before not in labels[:number]:
                raise UserError(f"{name}: {stage.label} comes after {before!r}, which is no stage before it"
                                f"{nearest(before, labels[:number])}")
    return config

"""Chain files for `megatron-sov submit chain`: stages and their order, in YAML."""

import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import AtLeastOne, NotNegativeInt, parse_settings_yaml, read_settings_text
from megatron_sov.work.clusters import cluster

WORK = re.compile(r"\$WORK\b|\$\{WORK\}")


@dataclass(frozen=True)
class ChainStage:
    """A stage in a chain file."""

    stage: str
    """Name in `operate.slurm.stages.STAGES`."""
    arguments: str
    """Arguments for the stage's command, quoted as in a shell; `$WORK` stands for the environment variable
    WORK."""
    name: str = ""
    """Name in the chain; "": `stage`."""
    after: tuple[str, ...] | None = None
    """Names of the stages that must be complete; null: the previous stage."""
    cluster: str = ""
    """Cluster profile; "": the chain's profile."""
    nodes: AtLeastOne = 1
    """Nodes for a training stage."""
    min_nodes: NotNegativeInt = 0
    """Minimum nodes after a node failure; 0: all `nodes`."""
    nodes_set: tuple[str, ...] = ()
    """N:key=value: settings on N nodes."""
    engine_nodes: NotNegativeInt = 0
    """rl-run --engine vllm: additional nodes, for engine servers."""
    array: NotNegativeInt = 0
    """data pack: number of tasks that share the inputs."""
    time_limit: str | None = None
    """Replaces the profile's time limit."""
    note: str = ""
    """Comment in the stage's script from --scripts."""

    @property
    def label(self) -> str:
        return self.name or self.stage

    def argv(self, work: str | None) -> tuple[str, ...]:
        """Split the arguments as a shell does.

        Args:
            work: value of `$WORK`; None: the environment variable.

        Raises:
            UserError: unmatched quotes, or an unset WORK.
        """
        try:
            argv = shlex.split(self.arguments, comments=True)
        except ValueError as e:
            raise UserError(f"arguments = {self.arguments!r}: is not valid shell syntax ({e}); fix the "
                            "quotes") from None
        return tuple(WORK.sub(lambda match: get_work_folder() if work is None else work, word)
                     for word in argv)


@dataclass(frozen=True)
class ChainConfig:
    """Content of a chain file."""

    stages: tuple[ChainStage, ...]
    cluster: str = ""
    """Cluster profile for all stages; "": --cluster."""
    description: str = ""
    """One line."""


def get_work_folder() -> str:
    """Return the absolute path in the environment variable WORK. Raises `UserError`: WORK is not set."""
    if not os.environ.get("WORK"):
        raise UserError("$WORK is not set; export WORK=FOLDER, a folder on a disk shared by all nodes")
    return str(Path(os.environ["WORK"]).absolute())


def list_chains() -> list[str]:
    """Return the names of the packaged chain files."""
    return [*cluster.list_packaged_files("chains")]


def read_chain(name: str) -> ChainConfig:
    """Read a chain file, by a name in `list_chains` or by its path. Raises `UserError`: a missing or invalid
    file, or an invalid order of stages."""
    if name in list_chains():
        text = cluster.list_packaged_files("chains")[name].read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_settings_text(Path(name), name)
    else:
        chain_names = list_chains()
        raise UserError(f"{name}: does not exist{suggest_name(name, chain_names)} (chains: "
                        f"{', '.join(chain_names)}; your own: a YAML file with `stages`, docs/slurm.md)")
    config = parse_settings_yaml(ChainConfig, text, name, rules=False)
    if not config.stages:
        raise UserError(f"{name}: has no stages")
    labels = [stage.label for stage in config.stages]
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"{name}: {repeated[0]!r} names two stages; give one of them another `name`")
    for number, stage in enumerate(config.stages):
        # only earlier stages: a chain has no cycle
        for label in stage.after or ():
            if label not in labels[:number]:
                raise UserError(f"{name}: {stage.label} comes after {label!r}, which is not an earlier "
                                f"stage{suggest_name(label, labels[:number])}")
    return config

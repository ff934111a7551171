"""Cluster profiles: what a job has to know about the machines it runs on, read from YAML."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from megatron_sov.base.errors import Fix, UserError, nearest
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, Breach, NotNegative, NotNegativeInt, ProblemCode, SettingsError,
    SettingsProblem, find_broken, read_text, read_yaml, rules_of)
from megatron_sov.work.clusters.chips import (
    CHIPS, INFINIBAND_LATENCY_S, INSIDE_LATENCY_S, Chip, Links, of_device)

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|PRIVATE_KEY)S?$", re.IGNORECASE)
"""How the names of variables end that hold what must not stand in a file."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TIME_LIMIT = re.compile(r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"
                        r"|((?P<h>\d+):(?=\d+:))?(?P<m>\d+)(:(?P<s>\d+))?")
"""The forms that sbatch's manual names: with days, or hours:minutes:seconds, minutes:seconds, minutes."""
MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
"""The forms of sbatch's --mem."""
MEMORY_SHIFTS = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}
"""Its unit -> the power of two of its bytes; without one it means megabytes."""
LARGEST_SERVER = 8
"""GPUs of one server; a larger NVLink domain spans nodes."""
MOST = 1_000_000_000
"""No price, power, rate or time of a profile is larger."""
MAX_SIGNAL_LEAD_S = 65535
"""The most that sbatch's --signal takes."""
Amount = Annotated[float, Ge(0), Le(MOST)]


def _no_chip(key: str) -> Breach | None:
    if not key or key in CHIPS:
        return None
    meant = of_device(key)  # another spelling
    close = f"; did you mean {meant.key!r}?" if meant else nearest(key.lower(), CHIPS)
    rule = f"must be one of {', '.join(sorted(CHIPS))}, or empty for another kind"
    return ProblemCode.CHOICE, rule, close[2:]


def _no_variable(name: str) -> Breach | None:
    return None if VARIABLE.fullmatch(name) else (ProblemCode.BOUND, "is not a name of a variable", "")


def _secret(name: str) -> Breach | None:
    return (ProblemCode.BOUND, "looks like the name of a secret, which must not stand in a script",
            "export it in the shell that submits: jobs inherit that") if SECRET.search(name) else None


def _no_absolute_path(path: str) -> Breach | None:
    return (ProblemCode.BOUND, "must begin with /, for it is taken as it stands",
            "where a variable names the folder, leave it out and export TMPDIR in a line of setup"
            ) if path and not path.startswith("/") else None


KnownChip = Annotated[str, Bound(_no_chip)]
VariableName = Annotated[str, Bound(_no_variable)]


@dataclass(frozen=True)
class ContainerConfig:
    """What the Python of a job runs in."""

    kind: Literal["none", "apptainer", "enroot", "pyxis"] = "none"
    """none: the Python of the login node; apptainer and enroot: started on each node; pyxis:
    enroot by srun's own options."""
    image: str = ""
    """Image file or address, as the container program takes it."""
    mounts: tuple[str, ...] = ()
    """Folders that are seen inside: FROM or FROM:TO."""


@dataclass(frozen=True)
class PreflightConfig:
    """What every node has to show before each start; one that does not is left out."""

    enabled: bool = True
    """Whether nodes are looked at; costs a start of torch on each of them."""
    min_free_disk_bytes: NotNegativeInt = 10_000_000_000
    """Free space on the scratch folder's disk."""
    max_clock_skew_s: AboveZero = 5.0
    """How far a node's clock may be from the median of all nodes."""
    max_matmul_ratio: Annotated[float, Gt(1), Lt(math.inf)] = 1.5
    """How many times longer than the median of all ranks a matrix product may take."""
    min_matmul_tflops: NotNegative = 0.0
    """Slowest matrix product (bf16 on GPUs, float32 on CPUs); 0: only compared with the other ranks."""
    max_gpu_used_bytes: NotNegativeInt = 2_000_000_000
    """Memory of a rank's GPU that others may have taken before the start."""
    transformer_engine: bool = True
    """Whether every rank with a GPU has to be able to import Transformer Engine, which bf16 needs there."""
    max_allreduce_s: AboveZero = 10.0
    """Longest all-reduce of 64 MiB over all ranks, after a first one that opens the connections."""
    timeout_min: AtLeastOne = 10
    """Minutes after which the look itself counts as failed."""


@dataclass(frozen=True)
class ClusterProfile:
    """A cluster, and how jobs behave there."""

    description: str
    """One line for people."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    account: str | None = None
    """Slurm account; empty: the cluster asks for none; null: has to be given by --account."""
    qos: str = ""
    """Slurm quality of service; empty: the default."""
    constraint: str = ""
    """Features that nodes must have; empty: any."""
    time_limit: str = "1-00:00:00"
    """Time limit of training jobs, as Slurm writes it: minutes, H:MM:SS or D-HH:MM:SS.  Other
    stages ask for no more."""
    signal_lead_s: Annotated[int, Ge(1), Le(MAX_SIGNAL_LEAD_S)] = 600
    """Seconds before the time limit at which a run is asked to save and stop; Slurm may ask up
    to a minute earlier."""
    gpus_per_node: NotNegativeInt = 8
    """GPUs of a node; one rank is started for each.  0: training runs on CPUs."""
    gpu: KnownChip = ""
    """What they are, by its name in `slurm/chips.yaml`: runs that do not fit its memory are refused,
    recommended layouts are taken, and `plan` prices runs; empty: another kind, and nobody looks."""
    ranks_per_node: AtLeastOne = 1
    """Ranks of a node where there are no GPUs."""
    cpus_per_node: int = 96
    """Cores of a node."""
    memory: str = "0"
    """Memory of a node, as Slurm writes it; 0: all of it, and nobody knows how much that is."""
    exclusive: bool = True
    """Whether nodes are taken as a whole."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before anything else, as they stand."""
    environment: dict[Annotated[VariableName, Bound(_secret)], str] = dataclasses.field(default_factory=dict)
    """Variables for all ranks: NCCL and the network.  Never secrets."""
    container: ContainerConfig = ContainerConfig()
    """What the Python of a job runs in."""
    python: str = ""
    """Python program on the nodes or in the container; empty: that of the login node,
    or python3 in a container."""
    scratch: Annotated[str, Bound(_no_absolute_path)] = ""
    """Folder on each node's own disk for temporary files and compiled kernels; made where it is missing;
    empty: the default."""
    preflight: PreflightConfig = PreflightConfig()
    """What every node has to show before each start."""
    nvlink_domain: Annotated[int, Ge(0), Le(MOST)] = 0
    """GPUs that NVLink joins; 0: those of a node, or the 72 of an NVL72."""
    network_gbits_per_gpu: Amount = 0.0
    """What the adapters of one GPU bring to other nodes, one direction, Gb/s; 0: nobody has said, and `plan`
    prices nothing that leaves an NVLink domain."""
    network_latency_us: Amount = INFINIBAND_LATENCY_S * 1e6
    """Of one small message between nodes, microseconds: InfiniBand across leaves 3.7, RoCE 5.6 (DeepSeek-V3,
    arXiv 2505.09343, table 5)."""
    storage_write_gbytes_per_s: Amount = 0.0
    """What all nodes together can write to the shared file system, GB/s; 0: nobody has said, and `plan`
    cannot tell how long a checkpoint takes.  20 for each 32 nodes is NVIDIA's standard for a SuperPOD of
    H100, 62 its better one (reference architecture, storage)."""
    price_per_gpu_hour: Amount = 0.0
    """What an hour of one GPU costs, USD, all included; 0: the chip's typical price, as a range."""
    pue: Annotated[float, Ge(1), Le(MOST)] = 1.3
    """Power usage effectiveness: energy of the whole site over that of its computers.  1.08 at Meta, 1.56 on
    average (Uptime Institute's survey of 2024); good new sites lie between."""
    node_power_w: Amount = 0.0
    """Most that a node draws, GPUs, CPUs, fans and all; 0: as the chip maker's own server."""
    failures_per_gpu_year: Amount = 0.17
    """How often something ends a whole run, for each of its GPUs and years.  Published: 0.173 (Llama 3 405B,
    419 in 54 days on 16,384 H100, arXiv 2407.21783, section 3.3.4), 0.30 and 0.11 (6.5 and 2.34 for 1,000
    node-days of 8 A100 each in Meta's two research clusters, arXiv 2410.21680)."""
    restart_s: Amount = 600.0
    """From such an end to the first new step: noticed, nodes looked at, started, checkpoint loaded.  Below 10
    minutes in MegaScale (arXiv 2402.15627, section 4)."""
    max_strikes: AtLeastOne = 2
    """Failures of a node after which it is excluded from the job."""
    max_failures: AtLeastOne = 3
    """Failures in a row without a new checkpoint after which the job stops."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or self.ranks_per_node

    @property
    def chip(self) -> Chip:
        """The GPUs of a node.

        Raises:
            UserError: there are none, or nobody has said which.
        """
        if not (self.gpus_per_node and self.gpu):
            lacks = "gpu is empty" if self.gpus_per_node else "gpus_per_node is 0"
            raise UserError(f"{lacks} in the profile, so that nobody knows what its nodes compute with; take "
                            f"a profile with gpu set to one of {', '.join(sorted(CHIPS))}")
        return CHIPS[self.gpu]

    @property
    def power_per_gpu_w(self) -> float:
        """Most that a GPU and its share of the node draw."""
        return self.node_power_w / self.gpus_per_node if self.node_power_w else self.chip.server_power_w

    @property
    def memory_bytes(self) -> int:
        """Memory of a node; 0: nobody knows."""
        found = MEMORY.fullmatch(self.memory)
        return int(found["number"]) << MEMORY_SHIFTS[found["unit"].upper()] if found else 0

    @property
    def cpus_per_task(self) -> int:
        return max(1, self.cpus_per_node // self.tasks_per_node)

    @property
    def python_program(self) -> str:
        return self.python or (sys.executable if self.container.kind == "none" else "python3")

    def problems(self) -> list[SettingsProblem]:
        return find_broken(
            self, "",
            (self.cpus_per_node >= max(1, self.tasks_per_node), "cpus_per_node",
             f"must be at least one for each of the {self.tasks_per_node} ranks of a node"),
            (self.container.kind == "none" or bool(self.container.image), "container.image",
             f"must not be empty: container.kind is {self.container.kind}",
             "name an image, or set kind to none"))


def links(profile: ClusterProfile, num_gpus: int) -> Links:
    """Return what joins the GPUs of a run.

    Args:
        profile: where it runs.
        num_gpus: GPUs of the run; inside one NVLink domain it needs no network.

    Raises:
        UserError: the profile does not say which GPUs it has, or what joins them beyond an NVLink domain.
    """
    of = profile.chip
    # an NVL72 joins several nodes; in others NVLink ends with the server, of which a node may be a part
    in_one = of.nvlink_domain if of.nvlink_domain > LARGEST_SERVER else min(LARGEST_SERVER,
                                                                            profile.gpus_per_node)
    domain = profile.nvlink_domain or in_one
    if num_gpus > domain and not profile.network_gbits_per_gpu:
        raise UserError(f"network_gbits_per_gpu is missing in the profile, and {num_gpus:,} GPUs are more "
                        f"than the {domain} that NVLink joins; set it ({of.name} in servers of its maker: "
                        f"{of.network_bytes_per_s * 8 / 1e9:g}), or plan with at most {domain} GPUs")
    return Links(domain, of.nvlink_bytes_per_s, profile.network_gbits_per_gpu * 1e9 / 8, INSIDE_LATENCY_S,
                 profile.network_latency_us * 1e-6)


def shipped(folder: str) -> dict[str, Traversable]:
    """Return name -> file of what comes with the package: `clusters` or `chains`."""
    files = importlib.resources.files("slurm").joinpath(folder).iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def names() -> list[str]:
    return [*shipped("clusters")]


def time_limit_s(text: str) -> float:
    """Return the seconds of a time limit in any form that sbatch takes; infinity where it asks for none.

    Raises:
        UserError: it has none of these forms.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = TIME_LIMIT.fullmatch(text)
    if found is None:
        raise UserError(f"time limit {text!r}: must be minutes, H:MM:SS or D-HH:MM:SS; "
                        "set --time, or the profile's time_limit")
    # seconds of each group of the pattern; those that did not match are None
    units = {"d": 86400, "dh": 3600, "dm": 60, "ds": 1, "h": 3600, "m": 60, "s": 1}
    return sum(int(found[name] or 0) * seconds for name, seconds in units.items()) or math.inf


def settings_by_nodes(given: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return number of nodes -> settings, of N:key=value arguments.

    Raises:
        UserError: one of another form.
    """
    settings: dict[int, tuple[str, ...]] = {}
    for text in given:
        count, colon, setting = text.partition(":")
        if not colon or not count.isdigit() or "=" not in setting:
            raise UserError(f"--nodes-set {text}: must have the form N:key=value, e.g. 2:parallel.ep=2")
        settings[int(count)] = (*settings.get(int(count), ()), setting)
    return settings


def load(name: str, *, account: str | None = None, partition: str | None = None,
         needs_account: bool = True) -> ClusterProfile:
    """Return a profile: one that comes with the package, or a YAML file of the user's.

    Args:
        name: name of a shipped profile, or path of a file that ends with .yaml.
        account: Slurm account of the command line; None: as the profile says.
        partition: partition of the command line; None: as the profile says.
        needs_account: whether an account that the profile leaves to the command line has to be given.

    Raises:
        UserError: there is none, it cannot be read, it has no such field, or it breaks a rule.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"--cluster {name}: does not exist; pass a file, or one of {', '.join(names())}")
        text = read_text(file, f"--cluster {name}")
    elif name in names():
        text = shipped("clusters")[name].read_text(encoding="utf-8")
    else:
        raise UserError(f"--cluster {name}: there is no such profile{nearest(name, names())} (profiles: "
                        f"{', '.join(names())}; your own: a path that ends with .yaml)")
    # rules wait until the command line's account and partition are in
    profile = read_yaml(ClusterProfile, text, f"--cluster {name}", rules=False)
    profile = dataclasses.replace(profile, account=profile.account if account is None else account,
                                  partition=profile.partition if partition is None else partition)
    problems = rules_of(profile)
    if profile.account is None and needs_account:
        problems.append(SettingsProblem(ProblemCode.MISSING, "account", "is missing",
                                        way_out="pass --account NAME, or put "
                                        'it into a profile of your own ("" where the cluster asks for none)',
                                        fix=Fix(options=("--account", "ACCOUNT"))))
    if problems:
        raise SettingsError(f"--cluster {name}", problems)
    return profile


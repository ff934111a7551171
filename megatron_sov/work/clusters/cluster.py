"""Cluster profiles, read from YAML: partition, nodes, containers, network, prices."""

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

from megatron_sov.base.errors import Fix, UserError, find_nearest_name, suggest_name
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, NotNegative, NotNegativeInt, ProblemCode, SettingsError, SettingsProblem,
    Violation, find_broken_rules, find_rule_problems, parse_settings_yaml, read_settings_text, require_that)
from megatron_sov.work.clusters.chips import (
    CHIPS, INFINIBAND_LATENCY_S, INSIDE_LATENCY_S, Chip, Links, find_device_chip)

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|PRIVATE_KEY)S?$",
                         re.IGNORECASE)
"""Pattern of variable names whose values must not appear in scripts."""
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNITS = re.compile(r"(\d+) ?([mhd])[a-z]*")
_UNIT_FORMATS = {"m": "{}", "h": "{}:00:00", "d": "{}-00:00:00"}
"""Unit in a time limit such as 24h -> sbatch format."""
TIME_LIMIT = re.compile(r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"
                        r"|((?P<h>\d+):(?=\d+:))?(?P<m>\d+)(:(?P<s>\d+))?")
"""Time formats of sbatch: with days, or hours:minutes:seconds, minutes:seconds, minutes."""
MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
"""Memory formats of sbatch --mem."""
MEMORY_SHIFTS = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}
"""Unit -> power of two in bytes; without unit, megabytes."""
LARGEST_SERVER = 8
"""GPUs per server; larger NVLink domains span nodes."""
MAX_AMOUNT = 1_000_000_000
"""Upper bound of prices, powers, rates and times in a profile."""
MAX_SIGNAL_LEAD_S = 65535
"""Maximum of sbatch's --signal."""
Amount = Annotated[float, Ge(0), Le(MAX_AMOUNT)]


def _check_chip(key: str) -> Violation | None:
    if not key or key in CHIPS:
        return None
    alias_chip = find_device_chip(key)  # known under another spelling
    suggestion = f"; did you mean {alias_chip.key!r}?" if alias_chip else suggest_name(key.lower(), CHIPS)
    rule = f"must be one of {', '.join(sorted(CHIPS))}, or empty for another kind"
    return ProblemCode.CHOICE, rule, suggestion[2:]


KnownChip = Annotated[str, Bound(_check_chip)]
VariableName = Annotated[str, require_that(VARIABLE_NAME.fullmatch, "is not a name of a variable")]
PublicVariable = Annotated[VariableName, require_that(
    lambda name: not SECRET_NAME.search(name), "looks like the name of a secret, which must not stand in a "
    "script", "export it in the shell that submits: jobs inherit that")]
AbsolutePath = Annotated[str, require_that(
    lambda path: not path or path.startswith("/"), "must begin with /, because it is used verbatim",
    "where a variable names the folder, leave it out and export TMPDIR in a line of setup")]


@dataclass(frozen=True)
class ContainerConfig:
    """Container for a job's Python."""

    kind: Literal["none", "apptainer", "enroot", "pyxis"] = "none"
    """none: the login node's Python; apptainer, enroot: started on the nodes; pyxis: enroot through srun
    options."""
    image: str = ""
    """Image file or address for the container program."""
    mounts: tuple[str, ...] = ()
    """Mounted folders: FROM or FROM:TO."""


@dataclass(frozen=True)
class PreflightConfig:
    """Node checks before each start; failing nodes are excluded."""

    enabled: bool = True
    """Check nodes before each start; costs a start of torch per node."""
    min_free_disk_bytes: NotNegativeInt = 10_000_000_000
    """Minimum free space on the scratch folder's disk."""
    max_clock_skew_s: AboveZero = 5.0
    """Maximum difference between a node's clock and the median of all nodes."""
    max_matmul_ratio: Annotated[float, Gt(1), Lt(math.inf)] = 1.5
    """Maximum time of a matrix product relative to the median of all ranks."""
    min_matmul_tflops: NotNegative = 0.0
    """Minimum speed of a matrix product (bf16 on GPUs, float32 on CPUs); 0: only compare ranks."""
    max_gpu_used_bytes: NotNegativeInt = 2_000_000_000
    """Maximum memory in use on a rank's GPU before the start."""
    transformer_engine: bool = True
    """Check that ranks with a GPU can import Transformer Engine (required for bf16 on GPUs)."""
    max_allreduce_s: AboveZero = 10.0
    """Maximum time of a 64 MiB all-reduce over the whole job, after a warm-up."""
    max_exchange_ratio: Annotated[float, Gt(1), Lt(math.inf)] = 3.0
    """Maximum time of an exchange with other nodes relative to the median of all ranks. Assumed."""
    timeout_min: AtLeastOne = 10
    """Minutes after which the check itself counts as failed."""


@dataclass(frozen=True)
class ClusterProfile:
    """A cluster and the behaviour of its jobs."""

    description: str
    """Short description."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    account: str | None = None
    """Slurm account; empty: not needed; null: must be passed with --account."""
    qos: str = ""
    """Slurm quality of service; empty: the default."""
    constraint: str = ""
    """Required node features; empty: any."""
    time_limit: str = "1-00:00:00"
    """Time limit of training jobs in Slurm's format: minutes, H:MM:SS or D-HH:MM:SS. Other stages request at
    most this."""
    signal_lead_s: Annotated[int, Ge(1), Le(MAX_SIGNAL_LEAD_S)] = 600
    """Seconds before the time limit at which training saves and stops; Slurm may signal up to a minute
    earlier."""
    gpus_per_node: NotNegativeInt = 8
    """GPUs (and ranks) per node. 0: train on CPUs."""
    gpu: KnownChip = ""
    """GPU model, by its name in `slurm/chips.yaml`. Enables memory checks, recommended layouts and prices in
    `plan`; empty: unknown model, no checks."""
    ranks_per_node: AtLeastOne = 1
    """Ranks per node without GPUs."""
    cpus_per_node: int = 96
    """Cores per node."""
    memory: str = "0"
    """Memory per node in Slurm's format; 0: request all memory, size unknown."""
    exclusive: bool = True
    """Allocate whole nodes."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Shell lines to run first, verbatim."""
    environment: dict[PublicVariable, str] = dataclasses.field(default_factory=dict)
    """Environment variables for the ranks, e.g. NCCL settings. Never secrets."""
    container: ContainerConfig = ContainerConfig()
    """Container for a job's Python."""
    python: str = ""
    """Python program on the nodes or in the container; empty: the login node's, or python3 in a container."""
    dispatchers: tuple[Literal["alltoall", "allgather", "deepep", "hybridep"], ...] = ("alltoall",
                                                                                        "allgather")
    """Values of `parallel.expert_dispatcher` that work in the job's Python. `plan` and `submit` recommend no
    others; deepep and hybridep need kernels in the image (docs/gpu.md)."""
    cuda_graphs: tuple[Literal["moe_router", "moe_preprocess"], ...] = ()
    """Values of `gpu.cuda_graphs` that the nodes' GPUs can capture. `plan` and `submit` use no others."""
    scratch: AbsolutePath = ""
    """Folder for temporary files on each node's local disk, created if missing; empty: default."""
    preflight: PreflightConfig = PreflightConfig()
    """Node checks before each start."""
    nvlink_domain: Annotated[int, Ge(0), Le(MAX_AMOUNT)] = 0
    """Number of GPUs connected by NVLink; 0: a node's GPUs, or 72 for an NVL72."""
    network_gbits_per_gpu: Amount = 0.0
    """Network bandwidth per GPU to other nodes, one direction, Gb/s; 0: unknown, and `plan` does not estimate
    traffic beyond an NVLink domain."""
    network_latency_us: Amount = INFINIBAND_LATENCY_S * 1e6
    """Latency of a small message between nodes, microseconds: InfiniBand across leaves 3.7, RoCE 5.6
    (DeepSeek-V3, arXiv 2505.09343, table 5)."""
    price_per_gpu_hour: Amount = 0.0
    """Price of a GPU hour in USD, all included; 0: the chip's typical price, as a range."""
    max_strikes: AtLeastOne = 2
    """Failures of a node before the job excludes the node."""
    max_failures: AtLeastOne = 3
    """Consecutive failures without a new checkpoint after which the job stops."""

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node

    @property
    def chip(self) -> Chip:
        """GPU model of the nodes. Raises `UserError`: no GPUs, or the profile does not name them."""
        if not (self.gpus_per_node and self.gpu):
            problem = "gpu is empty" if self.gpus_per_node else "gpus_per_node is 0"
            raise UserError(f"{problem} in the profile, so the nodes' GPUs are unknown; "
                            f"use a profile with gpu set to one of {', '.join(sorted(CHIPS))}")
        return CHIPS[self.gpu]

    @property
    def memory_bytes(self) -> int:
        """Memory of a node; 0 if unknown."""
        match = MEMORY.fullmatch(self.memory)
        return int(match["number"]) << MEMORY_SHIFTS[match["unit"].upper()] if match else 0

    @property
    def cpus_per_task(self) -> int:
        return max(1, self.cpus_per_node // self.tasks_per_node)

    @property
    def python_program(self) -> str:
        return self.python or (sys.executable if self.container.kind == "none" else "python3")

    def problems(self) -> list[SettingsProblem]:
        return find_broken_rules(
            self, "",
            (self.cpus_per_node >= max(1, self.tasks_per_node), "cpus_per_node",
             f"must be at least one for each of the {self.tasks_per_node} ranks of a node"),
            (self.container.kind == "none" or bool(self.container.image), "container.image",
             f"must not be empty: container.kind is {self.container.kind}",
             "name an image, or set kind to none"))


def compute_links(profile: ClusterProfile, num_gpus: int) -> Links:
    """Return the interconnects for a run; within one NVLink domain no network is needed. Raises `UserError`:
    the profile lacks the GPU model, or the network bandwidth beyond an NVLink domain."""
    chip = profile.chip
    # An NVL72 domain spans nodes; otherwise NVLink ends at the server, and a node may be part of a server.
    chip_domain = chip.nvlink_domain
    if chip_domain <= LARGEST_SERVER:
        chip_domain = min(LARGEST_SERVER, profile.gpus_per_node)
    domain = profile.nvlink_domain or chip_domain
    if num_gpus > domain and not profile.network_gbits_per_gpu:
        raise UserError(f"network_gbits_per_gpu is missing in the profile, and {num_gpus:,} GPUs are more "
                        f"than the {domain} that NVLink joins; set it ({chip.name} in servers of its maker: "
                        f"{chip.network_bytes_per_s * 8 / 1e9:g}), or plan with at most {domain} GPUs")
    return Links(domain, chip.nvlink_bytes_per_s, profile.network_gbits_per_gpu * 1e9 / 8, INSIDE_LATENCY_S,
                 profile.network_latency_us * 1e-6)


def list_packaged_files(folder: str) -> dict[str, Traversable]:
    """Return name -> YAML file in `slurm/clusters` or `slurm/chains`."""
    files = importlib.resources.files("slurm").joinpath(folder).iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def list_profiles() -> list[str]:
    return [*list_packaged_files("clusters")]


def parse_time_limit(text: str) -> float:
    """Parse a time limit in any sbatch format to seconds; infinity: none. Raises `UserError`."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME_LIMIT.fullmatch(text)
    if match is None:
        words = _UNITS.fullmatch(text.lower())
        limit = _UNIT_FORMATS[words[2]].format(words[1]) if words else ""
        raise UserError(f"time limit {text!r}: must be minutes, H:MM:SS or D-HH:MM:SS; "
                        f"{f'write {limit}' if limit else 'set --time, or the time_limit in the profile'}",
                        Fix(options=("--time", limit)) if limit else None)
    # seconds per pattern group; unmatched groups are None
    units = {"d": 86400, "dh": 3600, "dm": 60, "ds": 1, "h": 3600, "m": 60, "s": 1}
    return sum(int(match[name] or 0) * seconds for name, seconds in units.items()) or math.inf


def parse_node_settings(arguments: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Parse N:key=value into number of nodes -> settings. Raises `UserError`: another form."""
    settings: dict[int, tuple[str, ...]] = {}
    for text in arguments:
        count, colon, setting = text.partition(":")
        if not colon or not count.isdecimal() or "=" not in setting:
            raise UserError(f"--nodes-set {text}: must have the form N:key=value, e.g. 2:parallel.ep=2")
        settings[int(count)] = (*settings.get(int(count), ()), setting)
    return settings


def load_profile(name: str, *, account: str | None = None, partition: str | None = None,
                 needs_account: bool = True) -> ClusterProfile:
    """Load a packaged profile, or a YAML file if `name` ends with .yaml; `account` and `partition` override
    the profile's. `needs_account`: require an account if the profile leaves it to the command line. Raises
    `UserError`: the profile does not exist or is invalid."""
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"--cluster {name}: does not exist; pass a file, or one of "
                            f"{', '.join(list_profiles())}")
        text = read_settings_text(file, f"--cluster {name}")
    elif name in list_profiles():
        text = list_packaged_files("clusters")[name].read_text(encoding="utf-8")
    else:
        nearest = find_nearest_name(name, list_profiles())
        raise UserError(f"--cluster {name}: there is no such profile{suggest_name(name, list_profiles())} "
                        f"(profiles: {', '.join(list_profiles())}; your own: a path that ends with .yaml)",
                        Fix(options=("--cluster", nearest or "h100")))
    # check rules only after applying account and partition
    profile = parse_settings_yaml(ClusterProfile, text, f"--cluster {name}", rules=False)
    profile = dataclasses.replace(profile, account=profile.account if account is None else account,
                                  partition=profile.partition if partition is None else partition)
    problems = find_rule_problems(profile)
    if profile.account is None and needs_account:
        problems.append(SettingsProblem(ProblemCode.MISSING, "account", "is missing",
                                        way_out="pass --account NAME, or put "
                                        'it into a profile of your own ("" where the cluster asks for none)',
                                        fix=Fix(options=("--account", "ACCOUNT"))))
    if problems:
        raise SettingsError(f"--cluster {name}", problems)
    return profile


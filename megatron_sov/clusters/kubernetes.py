"""Profiles of kind k8s: what a job has to know about a Kubernetes cluster, read from YAML."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_sov.clusters.chips import CHIPS
from megatron_sov.clusters.cluster import SECRET
from megatron_sov.config.model import STRICT
from megatron_sov.errors import UserError, nearest
from megatron_sov.settings import read_text, read_yaml

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123): a namespace."""
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""DNS labels joined by dots: runtimes, claims, secrets."""
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?")
"""How Kubernetes writes amounts, without its rarer forms."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Names of resources and of labels, with or without a domain before them."""
RESERVED = re.compile(r"PET_.*|RANK|WORLD_SIZE|(LOCAL|GROUP)_(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
"""Variables that the operator and torchrun set."""
KIND = re.compile(r"^kind:[ \t]*[\"']?(k8s|kubernetes)\b", re.MULTILINE)
OF_ITS_OWN = "/dev/shm"
"""Where the shared memory of processes lies; its volume is `shm_size`."""


@dataclass(frozen=True)
class VolumeConfig:
    """A persistent volume claim, and where the pods see it."""

    __pydantic_config__ = STRICT
    claim: str
    """Name of the claim, in the profile's namespace; all nodes have to be able to mount it at once."""
    mount: str
    """Absolute path in the pods."""
    read_only: bool = False
    """Whether nothing is written there."""


@dataclass(frozen=True)
class TolerationConfig:
    """A taint of nodes that the pods put up with."""

    __pydantic_config__ = STRICT
    key: str
    """The taint's key."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether its value counts."""
    value: str = ""
    """Its value, where the operator is Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Which effect; empty: all."""


@dataclass(frozen=True)
class KubernetesProfile:
    """A Kubernetes cluster with Kubeflow Trainer, and how jobs behave there."""

    __pydantic_config__ = STRICT
    kind: Literal["k8s"]
    """Tells such a profile from one of Slurm."""
    description: str
    """One line for people."""
    image: str
    """Container image with this package in it."""
    namespace: str = "default"
    """Where the job, its claims and its secrets live."""
    runtime: str = "torch-distributed"
    """The training runtime of the operator, one of its torch plugin."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Whether it belongs to the cluster or to the namespace."""
    gpus_per_node: int = 8
    """GPUs of a pod, which is a node of the run; one rank for each.  0: training runs on CPUs."""
    gpu: str = ""
    """What they are, by its name in `slurm/chips.yaml`: runs that do not fit its memory are refused,
    recommended layouts are taken; empty: another kind, and nobody looks."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the device plugin calls them."""
    ranks_per_node: int = 1
    """Ranks of a pod where there are no GPUs."""
    resources: dict[str, str] = dataclasses.field(default_factory=dict)
    """What a pod asks for and may use beside GPUs: cpu, memory, network adapters."""
    volumes: tuple[VolumeConfig, ...] = ()
    """Claims that the pods see; every path of a job lies on one of them."""
    shm_size: str = "64Gi"
    """Most of /dev/shm, which NCCL and data loaders use; it counts as the pod's memory."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables for all ranks: NCCL and the network.  Never secrets."""
    secrets: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variable -> SECRET/KEY of the namespace: the manifest holds the reference alone."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets by which the image is fetched."""
    node_selector: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: tuple[TolerationConfig, ...] = ()
    """Taints that the pods put up with."""
    capabilities: tuple[str, ...] = ()
    """Linux capabilities that are added to the container; IPC_LOCK for InfiniBand."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the job, for example the queue of Kueue."""
    python: str = "python3"
    """Python program in the image."""
    max_restarts: int = 3
    """How often torchrun starts the ranks of a pod again before the pod itself fails."""
    stop_grace_s: int = 600
    """Seconds from SIGTERM to SIGKILL, in which a run saves."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a pod."""
        return self.gpus_per_node or self.ranks_per_node

    def holds(self, path: Path, *, written: bool = False) -> bool:
        """Return whether a path lies on a volume, the innermost one, and may be written to if asked."""
        mounts = [v for v in self.volumes if PurePosixPath(path).is_relative_to(v.mount)]
        innermost = max(mounts, key=lambda v: len(PurePosixPath(v.mount).parts), default=None)
        return innermost is not None and not (written and innermost.read_only)

    def problems(self) -> list[str]:
        """Return one sentence for each rule that the profile breaks."""
        rules = [
            (bool(self.image) and not re.search(r"\s", self.image),
             f"image = {self.image!r} names no image; write the one that has this package "
             "(containers/Dockerfile)"),
            (self.gpus_per_node >= 0, f"gpus_per_node = {self.gpus_per_node} must not be negative"),
            (self.ranks_per_node >= 1, f"ranks_per_node = {self.ranks_per_node} must be at least 1"),
            (self.max_restarts >= 0, f"max_restarts = {self.max_restarts} must not be negative"),
            (self.stop_grace_s >= 1, f"stop_grace_s = {self.stop_grace_s} must be at least 1"),
            (bool(LABEL.fullmatch(self.namespace)),
             f"namespace = {self.namespace!r} is no DNS label: at most 63 of a-z, 0-9 and -, no - at an end"),
            (not self.gpu or self.gpu in CHIPS,
             f"gpu = {self.gpu!r} is not in the table{nearest(self.gpu.lower(), CHIPS)} (GPUs: "
             f"{', '.join(sorted(CHIPS))}); leave it empty for another"),
            (bool(self.python) and not re.search(r"\s", self.python),
             f"python = {self.python!r} must be one word, the program"),
        ]
        names = [("runtime", self.runtime)]
        names += [(f"volumes.{i}.claim", v.claim) for i, v in enumerate(self.volumes)]
        names += [(f"image_pull_secrets.{i}", name) for i, name in enumerate(self.image_pull_secrets)]
        names += [(f"secrets.{name}", text.partition("/")[0]) for name, text in self.secrets.items()]
        p = [sentence for holds, sentence in rules if not holds]
        p += [f"{field} = {name!r} is no name of Kubernetes: a-z, 0-9, - and . between them"
              for field, name in names if not SUBDOMAIN.fullmatch(name)]
        return p + self._problems_of_volumes() + self._problems_of_variables() + self._problems_of_names()

    def _problems_of_volumes(self) -> list[str]:
        mounts = [v.mount for v in self.volumes]
        p = [f"volumes.{i}.mount = {mount!r} must be an absolute path below /, without .., : and a / at its "
             "end" for i, mount in enumerate(mounts) if not re.fullmatch(r"(/[^/:\0]+)+", mount)
             or {".", ".."} & set(mount.split("/"))]
        p += [f"volumes: {mount} is mounted twice" for mount in sorted(set(mounts))
              if mounts.count(mount) > 1]
        if OF_ITS_OWN in mounts:
            p.append(f"volumes: {OF_ITS_OWN} is the volume of shm_size; choose another path")
        return p

    def _problems_of_variables(self) -> list[str]:
        p = [f"environment.{name} looks like a secret, which must not stand in a manifest; "
             f"write secrets: {{{name}: SECRET/KEY}}" for name in self.environment if SECRET.search(name)]
        for field, variables in (("environment", self.environment), ("secrets", self.secrets)):
            p += [f"{field}.{name} is not a name of a variable" for name in variables
                  if not VARIABLE.fullmatch(name)]
            p += [f"{field}.{name} is set by the operator and torchrun; leave it out" for name in variables
                  if RESERVED.fullmatch(name)]
        p += [f"{name} stands in environment and in secrets; leave it out of one"
              for name in self.environment if name in self.secrets]
        p += [f"secrets.{name} must have the form SECRET/KEY, the secret's name and the key in it; its "
              "content never stands in a profile" for name, text in self.secrets.items()
              if not SECRET_KEY.fullmatch(text.partition("/")[2])]
        return p

    def _problems_of_names(self) -> list[str]:
        p = [f"resources.{name} = {amount!r} is no amount as Kubernetes writes it, e.g. \"96\" or 1600Gi"
             for name, amount in (*self.resources.items(), ("shm_size", self.shm_size))
             if not QUANTITY.fullmatch(amount)]
        if self.gpu_resource in self.resources:
            p.append(f"resources.{self.gpu_resource}: is what gpus_per_node asks for; leave it out")
        for field, found in (("resources", self.resources), ("node_selector", self.node_selector),
                             ("labels", self.labels), ("gpu_resource", {self.gpu_resource: ""})):
            p += [f"{field}.{name} is no name of Kubernetes" for name in found
                  if not QUALIFIED.fullmatch(name)]
        for field, values in (("node_selector", self.node_selector), ("labels", self.labels)):
            p += [f"{field}.{name} = {value!r} is no value of a label: at most 63 of A-Z, a-z, 0-9, -, _ "
                  "and ." for name, value in values.items()
                  if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value)]
        p += [f"tolerations.{i}.value = {t.value!r}: belongs to operator: Equal; leave it out"
              for i, t in enumerate(self.tolerations) if t.value and t.operator == "Exists"]
        p += [f"capabilities.{name} is no name of a capability, e.g. IPC_LOCK" for name in self.capabilities
              if not re.fullmatch(r"[A-Z_]+", name)]
        return p


def names() -> list[str]:
    """Return the names of the profiles of kind k8s that come with the package."""
    folder = importlib.resources.files("slurm").joinpath("kubernetes")
    return sorted(entry.name.removesuffix(".yaml")
                  for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def is_kubernetes(name: str) -> bool:
    """Return whether what --cluster names is a profile of kind k8s."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).is_file() and bool(KIND.search(read_text(Path(name), f"--cluster {name}")))
    return name in names()


def load(name: str) -> KubernetesProfile:
    """Return a profile of kind k8s: one that comes with the package, or a YAML file of the user's.

    Raises:
        UserError: it cannot be read, it has no such field, or it breaks a rule.
    """
    if name in names():
        file = importlib.resources.files("slurm").joinpath("kubernetes", f"{name}.yaml")
        text = file.read_text(encoding="utf-8")
    else:
        text = read_text(Path(name), f"--cluster {name}")
    profile = read_yaml(KubernetesProfile, text, f"--cluster {name}", rules=False)
    problems = profile.problems()
    if problems:
        copied = f"; copy {name} to a file of your own and pass that" if name in names() else ""
        raise UserError(f"--cluster {name}: {'; '.join(problems)}{copied}")
    return profile

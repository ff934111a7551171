"""Profiles of kind k8s: what a job has to know about a Kubernetes cluster, read from YAML."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from megatron_sov.clusters.cluster import SECRET, KnownChip, VariableName
from megatron_sov.settings import (
    AtLeastOne,
    Bound,
    Breach,
    Code,
    NotNegativeInt,
    Problem,
    find_broken,
    read_text,
    read_yaml,
)

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123): a namespace."""
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""DNS labels joined by dots: runtimes, claims, secrets."""
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?")
"""How Kubernetes writes amounts, without its rarer forms."""
SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Names of resources and of labels, with or without a domain before them."""
RESERVED = re.compile(r"PET_.*|RANK|WORLD_SIZE|(LOCAL|GROUP)_(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
"""Variables that the operator and torchrun set."""
KIND = re.compile(r"^kind:[ \t]*[\"']?(k8s|kubernetes)\b", re.MULTILINE)
OF_ITS_OWN = "/dev/shm"
"""Where the shared memory of processes lies; its volume is `shm_size`."""
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
MOUNT = re.compile(r"(/(?!\.\.?(/|$))[^/:\0]+)+")


def _form(pattern: str | re.Pattern[str], rule: str, way_out: str = "") -> Bound:
    """Return the bound of a text that a pattern describes as a whole."""
    right = re.compile(pattern)

    def broken(text: str) -> Breach | None:
        return None if right.fullmatch(text) else (Code.BOUND, rule, way_out)

    return Bound(broken)


def _secret(name: str) -> Breach | None:
    return (Code.BOUND, "looks like the name of a secret, which must not stand in a manifest",
            f"write secrets: {{{name}: SECRET/KEY}}") if SECRET.search(name) else None


def _reserved(name: str) -> Breach | None:
    return (Code.BOUND, "is set by the operator and torchrun", "leave it out"
            ) if RESERVED.fullmatch(name) else None


Name = Annotated[str, _form(SUBDOMAIN, "is no name of Kubernetes: a-z, 0-9, - and . between them")]
Qualified = Annotated[str, _form(QUALIFIED, "is no name of Kubernetes")]
Quantity = Annotated[str, _form(QUANTITY, 'is no amount as Kubernetes writes it, e.g. "96" or 1600Gi')]
LabelValue = Annotated[str, _form(LABEL_VALUE, "is no value of a label: at most 63 of A-Z, a-z, 0-9, -, _ "
                                  "and .")]
Capability = Annotated[str, _form(r"[A-Z_]+", "is no name of a capability, e.g. IPC_LOCK")]
Variable = Annotated[VariableName, Bound(_reserved)]


@dataclass(frozen=True)
class VolumeConfig:
    """A persistent volume claim, and where the pods see it."""

    claim: Name
    """Name of the claim, in the profile's namespace; all nodes have to be able to mount it at once."""
    mount: Annotated[str, _form(MOUNT, "must be an absolute path below /, without .., : and a / at its "
                                "end")]
    """Absolute path in the pods."""
    read_only: bool = False
    """Whether nothing is written there."""


@dataclass(frozen=True)
class TolerationConfig:
    """A taint of nodes that the pods put up with."""

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

    kind: Literal["k8s"]
    """Tells such a profile from one of Slurm."""
    description: str
    """One line for people."""
    image: Annotated[str, _form(r"\S+", "names no image", "write the one that has this package "
                                "(containers/Dockerfile) into a profile of your own")]
    """Container image with this package in it."""
    namespace: Annotated[str, _form(LABEL, "is no DNS label: at most 63 of a-z, 0-9 and -, no - at an "
                                    "end")] = "default"
    """Where the job, its claims and its secrets live."""
    runtime: Name = "torch-distributed"
    """The training runtime of the operator, one of its torch plugin."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Whether it belongs to the cluster or to the namespace."""
    gpus_per_node: NotNegativeInt = 8
    """GPUs of a pod, which is a node of the run; one rank for each.  0: training runs on CPUs."""
    gpu: KnownChip = ""
    """What they are, by its name in `slurm/chips.yaml`: runs that do not fit its memory are refused,
    recommended layouts are taken; empty: another kind, and nobody looks."""
    gpu_resource: Qualified = "nvidia.com/gpu"
    """What the device plugin calls them."""
    ranks_per_node: AtLeastOne = 1
    """Ranks of a pod where there are no GPUs."""
    resources: dict[Qualified, Quantity] = dataclasses.field(default_factory=dict)
    """What a pod asks for and may use beside GPUs: cpu, memory, network adapters."""
    volumes: tuple[VolumeConfig, ...] = ()
    """Claims that the pods see; every path of a job lies on one of them."""
    shm_size: Quantity = "64Gi"
    """Most of /dev/shm, which NCCL and data loaders use; it counts as the pod's memory."""
    environment: dict[Annotated[Variable, Bound(_secret)], str] = dataclasses.field(default_factory=dict)
    """Variables for all ranks: NCCL and the network.  Never secrets."""
    secrets: dict[Variable, str] = dataclasses.field(default_factory=dict)
    """Variable -> SECRET/KEY of the namespace: the manifest holds the reference alone."""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets by which the image is fetched."""
    node_selector: dict[Qualified, LabelValue] = dataclasses.field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: tuple[TolerationConfig, ...] = ()
    """Taints that the pods put up with."""
    capabilities: tuple[Capability, ...] = ()
    """Linux capabilities that are added to the container; IPC_LOCK for InfiniBand."""
    labels: dict[Qualified, LabelValue] = dataclasses.field(default_factory=dict)
    """Labels of the job, for example the queue of Kueue."""
    python: Annotated[str, _form(r"\S+", "must be one word, the program")] = "python3"
    """Python program in the image."""
    max_restarts: NotNegativeInt = 3
    """How often torchrun starts the ranks of a pod again before the pod itself fails."""
    stop_grace_s: AtLeastOne = 600
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

    def problems(self) -> list[Problem]:
        """Return every rule between settings that the profile breaks."""
        mounts = [v.mount for v in self.volumes]
        p = [Problem(Code.TWICE, f"volumes.{i}.mount", "is mounted twice", mount, "choose another path")
             for i, mount in enumerate(mounts) if mount in mounts[:i]]
        p += [Problem(Code.RULE, f"tolerations.{i}.value", "belongs to operator: Equal", t.value,
                      "leave it out")
              for i, t in enumerate(self.tolerations) if t.value and t.operator == "Exists"]
        p += [Problem(Code.RULE, f"environment.{name}", "stands in secrets too", way_out="drop one")
              for name in self.environment if name in self.secrets]
        p += [Problem(Code.RULE, f"secrets.{name}", "must have the form SECRET/KEY, the secret's name and "
                      "the key in it; its content never stands in a profile")  # nor in this sentence
              for name, text in self.secrets.items() if not _is_secret_of_key(text)]
        return p + find_broken(
            self, "",
            (OF_ITS_OWN not in mounts, "volumes", f"has {OF_ITS_OWN}, which is the volume of shm_size",
             "choose another path"),
            (self.gpu_resource not in self.resources, "resources",
             f"has {self.gpu_resource}, which gpus_per_node asks for", "leave it out"))


def _is_secret_of_key(text: str) -> bool:
    secret, _, key = text.partition("/")
    return bool(SUBDOMAIN.fullmatch(secret) and SECRET_KEY.fullmatch(key))


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
    return read_yaml(KubernetesProfile, text, f"--cluster {name}")

"""Kubernetes: profiles of kind k8s, read from YAML, what the pods of a job have by them, and `kubectl`."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, Bound, Breach, NotNegativeInt, ProblemCode, SettingsProblem, find_broken, read_text,
    read_yaml)
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.cluster import SECRET, KnownChip, VariableName

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123): a namespace."""
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""DNS labels joined by dots: runtimes, claims, secrets."""
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[mkMGTPE])?")
"""How Kubernetes writes amounts, without its rarer forms."""
UNITS = {"m": 1e-3, "k": 1e3} | {f"{unit}{binary}": (1024.0 if binary else 1000.0) ** power
                                 for power, unit in enumerate("KMGTPE", 1) for binary in ("", "i")}
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
TIMEOUT_S = 60


def _form(pattern: str | re.Pattern[str], rule: str, way_out: str = "") -> Bound:
    right = re.compile(pattern)

    def broken(text: str) -> Breach | None:
        return None if right.fullmatch(text) else (ProblemCode.BOUND, rule, way_out)

    return Bound(broken)


def _secret(name: str) -> Breach | None:
    return (ProblemCode.BOUND, "looks like the name of a secret, which must not stand in a manifest",
            f"write secrets: {{{name}: SECRET/KEY}}") if SECRET.search(name) else None


def _reserved(name: str) -> Breach | None:
    return (ProblemCode.BOUND, "is set by the operator and torchrun", "leave it out"
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
        return self.gpus_per_node or self.ranks_per_node

    def amount(self, resource: str) -> float:
        """Return how much a pod of a whole node asks for of a resource; 0: nobody has said."""
        found = QUANTITY.fullmatch(self.resources.get(resource, "0"))
        return float(found[1]) * UNITS.get(found[2] or "", 1.0) if found else 0.0

    @property
    def cpus_per_node(self) -> int:
        """Cores of a node, as far as `resources` says."""
        return max(1, int(self.amount("cpu")))

    def holds(self, path: Path, *, written: bool = False) -> bool:
        """Return whether a path lies on a volume, the innermost one, and may be written to if asked."""
        mounts = [v for v in self.volumes if PurePosixPath(path).is_relative_to(v.mount)]
        # a volume may be mounted inside another one; the pod writes to the inner
        innermost = max(mounts, key=lambda v: len(PurePosixPath(v.mount).parts), default=None)
        return innermost is not None and not (written and innermost.read_only)

    def refuse_elsewhere(self, path: Path, *, written: bool = False) -> None:
        """Raise `UserError` where a path lies on no volume, or on none that may be written to if asked."""
        parts: list[str] = []
        for part in path.parts:  # as a pod would walk it where nothing is a link
            parts = parts[:-1] if part == ".." and len(parts) > 1 else [*parts, part]
        if not self.holds(Path(*parts), written=written):
            mounts = ", ".join(v.mount for v in self.volumes) or "none"
            which = "volume of the profile that may be written to" if written else "volume of the profile"
            raise UserError(f"{path}: lies on no {which} (mounts: {mounts}); name it as the pods see it, or "
                            "add its claim to volumes")

    def problems(self) -> list[SettingsProblem]:
        mounts = [v.mount for v in self.volumes]
        p = [SettingsProblem(ProblemCode.TWICE, f"volumes.{i}.mount", "is mounted twice", mount,
                             "choose another path")
             for i, mount in enumerate(mounts) if mount in mounts[:i]]
        p += [SettingsProblem(ProblemCode.RULE, f"tolerations.{i}.value", "belongs to operator: Equal",
                              t.value, "leave it out")
              for i, t in enumerate(self.tolerations) if t.value and t.operator == "Exists"]
        p += [SettingsProblem(ProblemCode.RULE, f"environment.{name}", "stands in secrets too",
                              way_out="drop one")
              for name in self.environment if name in self.secrets]
        p += [SettingsProblem(ProblemCode.RULE, f"secrets.{name}",
                              "must have the form SECRET/KEY, the secret's name and "
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
    return [*cluster.shipped("kubernetes")]


def is_kubernetes(name: str) -> bool:
    if name.endswith((".yaml", ".yml")):
        return Path(name).is_file() and bool(KIND.search(read_text(Path(name), f"--cluster {name}")))
    return name in names()


def load(name: str) -> KubernetesProfile:
    """Return a profile of kind k8s: one that comes with the package, or a YAML file of the user's.

    Raises:
        UserError: it cannot be read, it has no such field, or it breaks a rule.
    """
    text = (cluster.shipped("kubernetes")[name].read_text(encoding="utf-8") if name in names()
            else read_text(Path(name), f"--cluster {name}"))
    return read_yaml(KubernetesProfile, text, f"--cluster {name}")


def literal(word: str) -> str:
    """Return a word that Kubernetes leaves as it is: it replaces $(NAME), and takes $$ for $."""
    return word.replace("$", "$$")


def variables_of(profile: KubernetesProfile, **more: str) -> list[dict[str, Any]]:
    """Return a container's environment; what a secret holds is named, not written."""
    # the profile's own variables go last and win
    plain = {"PYTHONSAFEPATH": "1"} | more | profile.environment
    found: list[dict[str, Any]] = [{"name": name, "value": literal(value)} for name, value in plain.items()]
    for name, text in profile.secrets.items():
        secret, _, key = text.partition("/")
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def pod_of(profile: KubernetesProfile, container: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's specification: its container with the volumes, where it runs, how long a stop may
    take."""
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": profile.shm_size}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": OF_ITS_OWN}]
    for i, v in enumerate(profile.volumes):  # one for each place of a claim: a patch takes each name once
        volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": v.claim}})
        mounts.append({"name": f"volume-{i}", "mountPath": v.mount}
                      | ({"readOnly": True} if v.read_only else {}))
    container = container | {"volumeMounts": mounts}
    if profile.capabilities:
        container["securityContext"] = {"capabilities": {"add": list(profile.capabilities)}}
    pod: dict[str, Any] = {"volumes": volumes, "containers": [container],
                           "terminationGracePeriodSeconds": profile.stop_grace_s}
    if profile.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    if profile.node_selector:
        pod["nodeSelector"] = dict(profile.node_selector)
    if profile.tolerations:
        pod["tolerations"] = [{name: value for name, value in dataclasses.asdict(t).items() if value}
                              for t in profile.tolerations]
    return pod


def kubectl(*words: str, text: str = "", way_out: str = "type the command where it is") -> str:
    """Return what `kubectl` prints.

    Args:
        words: what follows its name.
        text: its standard input.
        way_out: what to do where it cannot be had here.

    Raises:
        UserError: it is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True,
                              timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(f"kubectl: is not on PATH; install it, or {way_out}") from None
    except OSError as e:
        raise UserError(f"kubectl: cannot be run ({e.strerror}); mend it, or {way_out}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"kubectl {words[0]}: has not answered for {TIMEOUT_S} s; what has been made tells "
                        "`kubectl get jobs,trainjobs`") from None
    if done.returncode:
        what = "refuses the job" if words[0] == "create" else f"{words[0]} fails"
        raise UserError(f"kubectl {what}: {' '.join(done.stderr.split()) or 'it gives no reason'}")
    return done.stdout.strip()


def living_jobs(namespace: str, names: Sequence[str]) -> list[str]:
    """Return which Jobs of a command wait or run.  Those behind one that has failed, or was deleted, would
    wait for ever, and are deleted, as Slurm takes them away.

    Args:
        namespace: of the Jobs.
        names: in the order in which they wait for one another.
    """
    said = kubectl("get", "jobs", *names, "--namespace", namespace, "--ignore-not-found", "--output", "json"
                   ) if names else ""
    found = json.loads(said or '{"items": []}')
    ends: dict[str, set[str]] = {}
    for job in found.get("items", [found]):  # of a single name it prints the Job alone
        conditions = job.get("status", {}).get("conditions", ())
        ends[job["metadata"]["name"]] = {c["type"] for c in conditions if c["status"] == "True"}
    living = [name for name in names if name in ends and not ends[name] & {"Complete", "Failed"}]
    # one that is not there was deleted, which counts as failed: the next waits for it in vain
    failed = [i for i, name in enumerate(names) if "Failed" in ends.get(name, {"Failed"})]
    if failed and (behind := [name for name in living if name in names[failed[0]:]]):
        delete_jobs(namespace, behind)
    return [name for name in living if not failed or name in names[:failed[0]]]


def delete_jobs(namespace: str, names: Sequence[str]) -> None:
    if names:
        kubectl("delete", "jobs", *names, "--namespace", namespace, "--ignore-not-found", "--wait=false")

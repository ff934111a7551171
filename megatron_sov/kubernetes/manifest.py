"""A stage as a TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), the operator that runs
distributed training on Kubernetes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.clusters.kubernetes import OF_ITS_OWN, KubernetesProfile
from megatron_sov.slurm.stages import Work

API = "trainer.kubeflow.org/v1alpha1"
MANAGER = "megatron-sov/submit"
"""Who patches the runtime, as the operator wants it named."""
TRAINER = "node"
"""What the operator calls the replicated job of the ranks, and its container."""
SCRIPT = """\
done=$1 folder=$2; shift 2
cd "$folder" || exit 2
"$@" & program=$!
stop() {  # the ranks save and end with 0; torchrun itself would give them 30 s
  trapped=1
  read -r ranks <"/proc/$program/task/$program/children"
  kill -TERM ${ranks:-$program} 2>/dev/null
}
trap stop TERM
while :; do trapped=''; wait "$program"; code=$?; [ -n "$trapped" ] || break; done
[ "$code" -eq 0 ] || exit "$code"
[ -z "$done" ] || [ -e "$done" ] || { echo "job: no $done, so the stage is not complete" >&2; exit 75; }
"""
"""What runs in each pod: with 0 it ends only where the stage is complete.  Nothing in it is one of
Kubernetes' own references, $(NAME)."""


@dataclass(frozen=True)
class Order:
    """A stage that is to become a manifest."""

    name: str
    """Of the job, a DNS label."""
    work: Work
    """What it has to do."""
    profile: KubernetesProfile
    """Where."""
    nodes: int
    """Pods."""
    settings: tuple[str, ...]
    """Settings that follow from the number of nodes."""
    folder: Path
    """Where relative paths start, in the pods."""
    time_limit_s: int | None
    """After so long the operator ends it; None: never."""


def render(order: Order) -> str:
    """Return the manifest, as YAML."""
    return yaml.dump(manifest(order), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def manifest(order: Order) -> dict[str, Any]:
    """Return the manifest's content."""
    profile = order.profile
    asked = dict(profile.resources)
    if order.work.kind.gpus and profile.gpus_per_node:
        asked[profile.gpu_resource] = str(profile.gpus_per_node)
    trainer: dict[str, Any] = {
        "image": profile.image,
        "command": ["bash", "-c", SCRIPT, "megatron-sov"],
        "args": [_literal(word) for word in _words(order)],
        "env": _variables(profile),
        "numNodes": order.nodes,
        "numProcPerNode": profile.tasks_per_node if order.work.kind.ranks else 1,
    }
    if asked:
        trainer["resourcesPerNode"] = {"requests": asked, "limits": dict(asked)}
    spec: dict[str, Any] = {"runtimeRef": {"apiGroup": API.partition("/")[0], "kind": profile.runtime_kind,
                                           "name": profile.runtime},
                            "trainer": trainer, "runtimePatches": [_patch(profile)]}
    if order.time_limit_s is not None:
        spec["activeDeadlineSeconds"] = order.time_limit_s
    metadata: dict[str, Any] = {"name": order.name, "namespace": profile.namespace}
    if profile.labels:
        metadata["labels"] = dict(profile.labels)
    return {"apiVersion": API, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _words(order: Order) -> list[str]:
    """Return what follows the script: what shows that the stage is complete, the folder, the command."""
    work, profile = order.work, order.profile
    done = str(work.done) if work.writes_done else ""
    command = [*work.kind.program, *work.arguments]
    for setting in order.settings:
        command += ["--set", setting]
    launcher = (["torch.distributed.run", "--max-restarts", str(profile.max_restarts), "-m", "--"]
                if work.kind.ranks else [])
    return [done, str(order.folder), profile.python, "-m", *launcher, *command]


def _literal(word: str) -> str:
    """Return a word that Kubernetes leaves as it is: it replaces $(NAME), and takes $$ for $."""
    return word.replace("$", "$$")


def _variables(profile: KubernetesProfile) -> list[dict[str, Any]]:
    """Return the container's environment; what a secret holds is named, not written."""
    plain = {"PYTHONSAFEPATH": "1"} | profile.environment
    found: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in plain.items()]
    for name, text in profile.secrets.items():
        secret, _, key = text.partition("/")
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _patch(profile: KubernetesProfile) -> dict[str, Any]:
    """Return what is changed in the runtime's pods: volumes, where they run, how long a stop may take."""
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": profile.shm_size}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": OF_ITS_OWN}]
    for i, v in enumerate(profile.volumes):  # one for each place of a claim: a patch takes each name once
        volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": v.claim}})
        mounts.append({"name": f"volume-{i}", "mountPath": v.mount}
                      | ({"readOnly": True} if v.read_only else {}))
    container: dict[str, Any] = {"name": TRAINER, "volumeMounts": mounts}
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
    job = {"name": TRAINER, "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": MANAGER,
            "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


class _Dumper(yaml.SafeDumper):
    """Writes lines below each other where a text has several, and says everything where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that no value is a reference to another place."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

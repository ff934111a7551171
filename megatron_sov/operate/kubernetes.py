"""One submission to Kubernetes: everything is checked, the stage becomes a TrainJob of Kubeflow Trainer
(trainer.kubeflow.org/v1alpha1), the operator that runs distributed training there.  `kubectl` is asked by the
command alone, where the user says so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.errors import UserError
from megatron_sov.operate.slurm.stages import Commands, StageWork, fitting_nodes, work_of
from megatron_sov.work.clusters.cluster import time_limit_s
from megatron_sov.work.clusters.kubernetes import KubernetesProfile, literal, pod_of, variables_of

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
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""What a TrainJob may be called (RFC 1035)."""
LONGEST_POD = 63
"""Characters of a pod's host name."""


def prepare(stage: str, arguments: list[str], profile: KubernetesProfile, commands: Commands, *,
            nodes: int = 1, name: str | None = None, time_limit: str | None = None) -> str:
    """Return a stage's manifest, as YAML; nothing is written and nobody is asked.

    Args:
        stage: name in `STAGES`.
        arguments: as a user would type them.
        profile: where.
        commands: the parsers of the stages' commands.
        nodes: pods.
        name: of the job; None: the stage's and its target's.
        time_limit: as sbatch takes it; None: no limit.

    Raises:
        UserError: the stage, its arguments, the nodes, the name or a path do not fit.
    """
    work = work_of(stage, arguments, commands)
    if not work.kind.ranks and nodes > 1:
        raise UserError(f"--nodes {nodes}: {stage} works on one node; leave it out")
    settings: tuple[str, ...] = ()
    if work.kind.ranks:
        settings = fitting_nodes(work, profile.tasks_per_node, nodes, nodes, {},
                                 profile.gpu if profile.gpus_per_node else "")[nodes]
    if (work.config is not None and work.config.evaluate.background.tasks
            and work.config.evaluate.background.where == "slurm"):
        raise UserError("evaluate.background.where = slurm: there is no Slurm in a pod; set it to another "
                        "place, or leave evaluate.background.tasks empty")
    profile.refuse_elsewhere(work.target, written=work.stage != "eval")
    for path in work.inputs:
        profile.refuse_elsewhere(path)
    if name is None:
        name = re.sub(r"[._]+", "-", f"{stage}-{work.target.name}".lower())
    longest = LONGEST_POD - len(f"-node-0-{nodes - 1}-xxxxx")
    if not NAME.fullmatch(name) or len(name) > longest:
        raise UserError(f"--job-name {name}: must be a DNS label of at most {longest} of a-z, 0-9 and -, "
                        "that begins with a letter and does not end with -; pass another --job-name")
    job = _manifest(work, profile, settings, nodes, name)
    if time_limit is not None and (seconds := time_limit_s(time_limit)) < math.inf:
        job["spec"]["activeDeadlineSeconds"] = int(seconds)
    return yaml.dump(job, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _manifest(work: StageWork, profile: KubernetesProfile, settings: tuple[str, ...], nodes: int,
              name: str) -> dict[str, Any]:
    """Return the manifest's content; `settings` follow from the number of nodes."""
    asked = dict(profile.resources)
    if work.kind.gpus and profile.gpus_per_node:
        asked[profile.gpu_resource] = str(profile.gpus_per_node)
    trainer: dict[str, Any] = {
        "image": profile.image,
        "command": ["bash", "-c", SCRIPT, "megatron-sov"],
        "args": [literal(word) for word in _words(profile, work, settings)],
        "env": variables_of(profile),
        "numNodes": nodes,
        "numProcPerNode": profile.tasks_per_node if work.kind.ranks else 1,
    }
    if asked:
        trainer["resourcesPerNode"] = {"requests": asked, "limits": dict(asked)}
    pod = {"spec": {"template": {"spec": pod_of(profile, {"name": TRAINER})}}}
    patch = {"manager": MANAGER, "trainingRuntimeSpec": {
        "template": {"spec": {"replicatedJobs": [{"name": TRAINER, "template": pod}]}}}}
    spec: dict[str, Any] = {"runtimeRef": {"apiGroup": API.partition("/")[0], "kind": profile.runtime_kind,
                                           "name": profile.runtime},
                            "trainer": trainer, "runtimePatches": [patch]}
    metadata = {"name": name, "namespace": profile.namespace} | (
        {"labels": dict(profile.labels)} if profile.labels else {})
    return {"apiVersion": API, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _words(profile: KubernetesProfile, work: StageWork, settings: tuple[str, ...]) -> list[str]:
    """Return what follows the script: what shows that the stage is complete, the folder where relative paths
    start, the command."""
    command = [*work.kind.program, *work.arguments]
    for setting in settings:
        command += ["--set", setting]
    launcher = (["torch.distributed.run", "--max-restarts", str(profile.max_restarts), "-m", "--"]
                if work.kind.ranks else [])
    return [str(work.done) if work.writes_done else "", str(Path.cwd() if profile.holds(Path.cwd()) else "/"),
            profile.python, "-m", *launcher, *command]


class _Dumper(yaml.SafeDumper):
    """Writes lines below each other where a text has several, and says everything where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that no value is a reference to another place."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

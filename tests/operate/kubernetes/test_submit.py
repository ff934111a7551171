"""`megatron-sov submit` with a profile of kind k8s: the manifests of docs/kubernetes.md, held against the
operator's published schema; what runs in a pod, run here; mistakes, each one sentence."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sov import cli
from megatron_sov.base.settings import SettingsError
from megatron_sov.operate.slurm.stages import SCRIPT
from megatron_sov.work.clusters import kubernetes
from tests.operate.kubernetes.local_cluster import expanded

PAGE = (Path(__file__).parents[3] / "docs/kubernetes.md").read_text()
PROFILE, RUNTIME = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TYPED = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
         for line in block.replace("\\\n", " ").splitlines()]
PUBLISHED = yaml.safe_load(Path(__file__).with_name("trainjob_schema.yaml").read_text())
HERE = ("--cluster", "site.yaml", "--dry-run")
RUN = ("tiny-solar-open", "--data", "/shared/tokens", "--run", "/shared/runs/a", "--set", "train.steps=5",
       "--set", "train.global_batch_size=8", "--set", "train.micro_batch_size=1")
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def refused(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Yield what a structural schema says against a value, as the API server with strict fields does."""
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            yield f"{where}: neither a number nor a text"
    elif type(value) is not TYPES[schema["type"]]:
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if isinstance(value, dict):
        yield from (f"{where}.{name}: is missing" for name in schema.get("required", ()) if name not in value)
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, part in value.items():
            if name in known:
                yield from refused(part, known[name], f"{where}.{name}")
            elif others:
                yield from refused(part, others, f"{where}.{name}")
            elif where != ".metadata":  # the API server's own
                yield f"{where}.{name}: is no field"
    if isinstance(value, list):
        if not len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: too many"
        keys = schema.get("x-kubernetes-list-map-keys", ())
        seen = [tuple(part.get(key) for key in keys) for part in value] if keys else []
        if len(set(seen)) < len(seen):
            yield f"{where}: two of the same {keys}"
        for i, part in enumerate(value):
            yield from refused(part, schema["items"], f"{where}.{i}")
    if isinstance(value, str) and not (len(value) >= schema.get("minLength", 0)
                                       and len(value) <= schema.get("maxLength", len(value))
                                       and re.search(schema.get("pattern", ""), value)
                                       and value in schema.get("enum", [value])):
        yield f"{where}: {value!r} does not fit"
    if isinstance(value, int) and value < schema.get("minimum", value):
        yield f"{where}: {value} is too small"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's profile as site.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(PROFILE)
    return tmp_path


def made(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["submit", *words]) == 0
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("line", TYPED)
def test_what_the_page_types_is_a_trainjob_of_the_published_schema(
    site: Path, capsys: pytest.CaptureFixture[str], line: str,
) -> None:
    assert cli.main(shlex.split(line)[1:]) == 0
    said = capsys.readouterr().out
    text = (site / "pretrain.yaml").read_text() if "--manifest" in line else said
    job = yaml.safe_load(text)
    group, _, version = job["apiVersion"].partition("/")
    assert (group, version, job["kind"]) == tuple(PUBLISHED[name] for name in ("group", "version", "kind"))
    assert list(refused(job, PUBLISHED["schema"])) == []
    assert job["metadata"]["name"] in PAGE
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["args"][2:10] == ["python3", "-m", "torch.distributed.run", "--max-restarts", "3", "-m",
                                     "--", "megatron_sov"]
    assert "--resume" in trainer["args"] and trainer["args"][0] == "/shared/runs/pretrain/complete.json"
    key = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}}
    assert key in trainer["env"]


def test_the_schema_refuses_what_the_operator_would(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = made(capsys, "pretrain", *HERE, *RUN)
    job["spec"]["trainer"] |= {"numNodes": "4", "numProcs": 8}
    job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"] = "much"
    job["spec"]["runtimePatches"] *= 2
    del job["spec"]["runtimeRef"]["name"]
    assert {sentence.split(":")[0] for sentence in refused(job, PUBLISHED["schema"])} == {
        ".spec.trainer.numNodes", ".spec.trainer.numProcs", ".spec.runtimePatches", ".spec.runtimeRef.name",
        ".spec.trainer.resourcesPerNode.limits.memory"}


def test_a_claim_may_be_seen_at_two_places(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "site.yaml").write_text(PROFILE.replace("claim: corpora", "claim: shared"))
    assert list(refused(made(capsys, "pretrain", *HERE, *RUN), PUBLISHED["schema"])) == []


def test_the_runtime_of_the_page_has_what_manifests_patch() -> None:
    runtime = yaml.safe_load(RUNTIME)
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert (job["name"], [c["name"] for c in pod["containers"]]) == ("node", ["node"])
    assert kubernetes.LABEL.fullmatch(runtime["metadata"]["name"])


def test_a_stage_of_one_node_is_one_process_and_asks_for_gpus_only_where_it_uses_them(
    site: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    job = made(capsys, "convert", *HERE, "--time", "30", "to-hf", "/shared/runs/a", "/shared/hf")
    trainer = job["spec"]["trainer"]
    assert list(refused(job, PUBLISHED["schema"])) == []
    assert trainer["args"] == ["/shared/hf/manifest.json", "/", "python3", "-m", "megatron_sov", "convert",
                               "to-hf", "/shared/runs/a", "/shared/hf"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)
    assert job["spec"]["activeDeadlineSeconds"] == 1800
    assert "nvidia.com/gpu" not in trainer["resourcesPerNode"]["limits"]


def test_kubernetes_gives_every_word_back_as_it_was_typed(
    site: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    odd = ("/shared/$(HOME)", "/shared/$$(x) 'y' \"z\" $$ ${A} `b`")
    args = made(capsys, "convert", *HERE, "--job-name", "odd", "to-hf", *odd)["spec"]["trainer"]["args"]
    assert [expanded(word, {"HOME": "/root"}) for word in args][-2:] == list(odd)
    assert expanded(SCRIPT, {}) == SCRIPT


def in_a_pod(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["bash", "-c", SCRIPT, "megatron-sov", *words], text=True, stderr=subprocess.PIPE)


def test_a_pod_ends_well_only_where_the_stage_is_complete(tmp_path: Path) -> None:
    done = tmp_path / "complete.json"
    for command, code in (("true", 75), ("exit 2", 2), (f"touch {done}", 0)):
        pod = in_a_pod(str(done), str(tmp_path), "bash", "-c", command)
        assert (pod.wait(), bool(pod.communicate()[1])) == (code, code == 75), command


def test_a_stop_goes_to_the_ranks_and_their_launcher_ends_by_itself(tmp_path: Path) -> None:
    """The launcher would end at once with 9 if it were asked itself."""
    rank = f"trap 'touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done"
    launcher = f"trap 'exit 9' TERM; bash -c {shlex.quote(rank)} & wait; exit 0"
    pod = in_a_pod(str(tmp_path / "complete.json"), "/", "bash", "-c", launcher)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    pod.send_signal(signal.SIGTERM)
    assert (pod.wait(timeout=600), (tmp_path / "saved").exists()) == (75, True)
    pod.communicate()


@pytest.mark.parametrize("program", ["cat >got; echo made", "echo 'exists already' >&2; exit 1"])
def test_kubectl_is_asked_only_by_apply(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str,
) -> None:
    (site / "bin").mkdir()
    (site / "bin/kubectl").write_text(f"#!/bin/bash\necho \"$@\" >asked\n{program}\n")
    (site / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{site / 'bin'}:{os.environ['PATH']}")
    job = made(capsys, "pretrain", *HERE, *RUN)
    assert not (site / "asked").exists()
    code = cli.main(["submit", "pretrain", "--cluster", "site.yaml", "--apply", *RUN])
    said = capsys.readouterr()
    assert (site / "asked").read_text() == "create -f -\n"
    if code == 0:
        assert (said.out, yaml.safe_load((site / "got").read_text())) == ("made\n", job)
    else:
        assert (code, said.err.count("\n")) == (2, 1)
        assert "kubectl refuses the job: exists already" in said.err


@pytest.mark.parametrize(("words", "sentence"), [
    (("pretrain", "--cluster", "k8s-h100", "--dry-run", *RUN), 'image = "" names no image'),
    (("pretrain", "--cluster", "site.yaml", *RUN), "say what becomes of the manifest"),
    (("pretrain", "--cluster", "site.yaml", "--apply", *RUN), "kubectl: is not on PATH"),
    (("pretrain", *HERE, "--manifest", "x", *RUN), "--dry-run: prints the manifest and does nothing else"),
    (("pretrain", "--cluster", "site.yaml", "--manifest", "/dev/null/x", *RUN), "--manifest /dev/null/x"),
    (("pretrain", *HERE, "--job-name", "My_Run", *RUN), "--job-name My_Run: must be a DNS label"),
    (("pretrain", *HERE, *RUN[:4], "/shared/" + "a" * 60, *RUN[5:]), "must be a DNS label of at most 48"),
    (("pretrain", *HERE, "--nodes", "3", *RUN), "--nodes 3 x 8 processes do not fit tiny-solar-open"),
    (("convert", *HERE, "--nodes", "2", "to-hf", "/shared/a", "/shared/b"), "convert works on one node"),
    (("convert", *HERE, "to-hf", "/shared/a", "/corpora/b"),
     "/corpora/b: lies on no volume of the profile that may be written to"),
    (("convert", *HERE, "to-hf", "/shared/../a", "/shared/b"),
     "/shared/../a: lies on no volume of the profile"),
    (("pretrain", *HERE, *RUN[:4], "runs/a", *RUN[5:]), "runs/a: lies on no volume of the profile"),
    (("pretrain", *HERE, "--min-nodes", "1", *RUN), "--min-nodes: belongs to Slurm"),
    (("eval-lm", *HERE, "--array", "2", "x"), "--array: belongs to Slurm"),
    (("chain", *HERE, "chain.yaml"), "submit chain: several jobs that wait for one another"),
    (("pretrain", "--cluster", "h100", "--account", "a", "--apply", *RUN), "--apply: belongs to Kubernetes"),
])
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out, said
    assert [path.name for path in site.iterdir()] == ["site.yaml"]


@pytest.mark.parametrize(("old", "new", "code", "key"), [
    ("namespace: training", "namespace: My_Space", "bound", "namespace"),
    ("claim: shared", "claim: shared_disk", "bound", "volumes.0.claim"),
    ("mount: /corpora", "mount: /shared", "twice", "volumes.1.mount"),
    ("mount: /corpora", "mount: /dev/shm", "rule", "volumes"),
    ("mount: /shared}", "mount: shared/..}", "bound", "volumes.0.mount"),
    ("mount: /shared}", "mount: /shared/../etc}", "bound", "volumes.0.mount"),
    ("memory: 1600Gi", "memory: much", "bound", "resources.memory"),
    ("wandb/api-key", "0123456789abcdef", "rule", "secrets.WANDB_API_KEY"),
    ("{NCCL_IB_HCA: mlx5", "{HF_TOKEN: abc", "bound", "environment.HF_TOKEN"),
    ("{NCCL_IB_HCA: mlx5", "{PET_NNODES: '2'", "bound", "environment.PET_NNODES"),
    ("rdma/hca", "nvidia.com/gpu", "rule", "resources"),
    ("gpus_per_node", "gpu_per_node", "unknown", "gpu_per_node"),
    ("image: registry.example.org/llm/megatron-sov:1", "", "missing", "image"),
    ("labels: {kueue.x-k8s.io/queue-name: llm}", "labels: {a: '-'}", "bound", "labels.a"),
])
def test_a_wrong_profile_is_one_sentence(site: Path, capsys: pytest.CaptureFixture[str], old: str, new: str,
                                         code: str, key: str) -> None:
    assert old in PROFILE
    (site / "site.yaml").write_text(PROFILE.replace(old, new))
    with pytest.raises(SettingsError) as told:
        kubernetes.load("site.yaml")
    assert told.value.codes == [(code, key)]
    assert cli.main(["submit", "pretrain", *HERE, *RUN]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --cluster site.yaml") and said.count("\n") == 1, said
    assert "0123456789" not in said  # a secret that is written where its name belongs


def test_the_profile_that_comes_with_the_package_lacks_an_image_alone() -> None:
    for name in kubernetes.names():
        with pytest.raises(SettingsError) as told:
            kubernetes.load(name)
        assert told.value.codes == [("bound", "image")]

"""Cluster profiles: the shipped ones are sound, and a mistake in one's own is said in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.clusters import cluster
from megatron_sov.errors import UserError
from megatron_sov.settings import SettingsError


def test_nine_profiles_come_with_the_package() -> None:
    assert cluster.names() == ["a100", "b200", "b300", "gb200", "gb300", "h100", "h200", "local", "one-node"]
    for name in cluster.names():
        profile = cluster.load(name, account="me")
        assert profile.problems() == [] and len(profile.description) > 20


def test_options_win_over_the_profile() -> None:
    profile = cluster.load("h100", account="me", partition="long")
    assert (profile.account, profile.partition) == ("me", "long")
    assert cluster.load("local", account=None, partition=None).account == ""
    assert (profile.tasks_per_node, profile.cpus_per_task) == (8, 14)


@pytest.mark.parametrize(("text", "code", "key"), [
    ("partitoin: a", "unknown", "partitoin"),
    ("container: {kind: docker}", "choice", "container.kind"),
    ("container: {kind: pyxis}", "rule", "container.image"),
    ("gpus_per_node: 8\ncpus_per_node: 4", "rule", "cpus_per_node"),
    ("account: null", "missing", "account"),
    ("environment: {WANDB_API_KEY: abc}", "bound", "environment.WANDB_API_KEY"),
    ('environment: {"A B": abc}', "bound", "environment.A B"),
    ("max_failures: 0", "bound", "max_failures"),
    ("time_limit: 2:00:00", "type", "time_limit"),
    ("signal_lead_s: 70000", "bound", "signal_lead_s"),
    ("scratch: $SLURM_TMPDIR", "bound", "scratch"),
    ("preflight: {max_matmul_ratio: 0.9}", "bound", "preflight.max_matmul_ratio"),
    ("preflight: {max_clock_skew_s: .nan}", "bound", "preflight.max_clock_skew_s"),
    ("gpu: b20", "choice", "gpu"),
    ("network_gbits_per_gpu: -1", "bound", "network_gbits_per_gpu"),
    ("restart_s: .inf", "bound", "restart_s"),
    ("pue: 0.9", "bound", "pue"),
    ("price_per_gpu_hour: cheap", "type", "price_per_gpu_hour"),
    ("a: [", "file", ""),
])
def test_a_mistake_is_named(tmp_path: Path, text: str, code: str, key: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["description: x", *([] if "account" in text else ['account: ""']), text]))
    with pytest.raises(SettingsError) as e:
        cluster.load(str(file))
    assert e.value.codes == [(code, key)]
    assert str(e.value).startswith(f"--cluster {file}")
    assert "\n" not in str(e.value) and "abc" not in str(e.value)


def test_another_spelling_of_a_gpu_is_answered_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('description: x\naccount: ""\ngpu: H100-80GB')
    with pytest.raises(SettingsError, match=r"must be one of a100, .*; did you mean 'h100'\?"):
        cluster.load(str(file))


@pytest.mark.parametrize(("text", "seconds"), [  # the forms of sbatch's manual
    ("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400),
    ("1-12:30:15", 131415), ("0", float("inf")), ("UNLIMITED", float("inf")),
])
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: float) -> None:
    assert cluster.time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "1:2:3:4", "-5", "1.5", "2h", "1-"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be minutes, H:MM:SS or D-HH:MM:SS"):
        cluster.time_limit_s(text)


def test_a_profile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mine.yaml: is no text in UTF-8 \(byte 0 is 0xff\)"):
        cluster.load(str(tmp_path / "mine.yaml"))


def test_an_unknown_profile_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--cluster h10: there is no such profile; did you mean 'h100'\?"):
        cluster.load("h10")
    with pytest.raises(UserError, match=r"--cluster nowhere.yaml: does not exist"):
        cluster.load("nowhere.yaml")


def test_links_of_a_profile() -> None:
    h100 = cluster.load("h100", needs_account=False)
    found = cluster.links(h100, 512)
    assert (found.domain, found.inside_bytes_per_s, found.between_bytes_per_s) == (8, 450e9, 50e9)
    assert cluster.links(cluster.load("gb200", needs_account=False), 512).domain == 72
    # half a server has half of its GPUs in a domain, unless the profile says otherwise
    assert cluster.links(replace(h100, gpus_per_node=4), 512).domain == 4
    assert cluster.links(replace(h100, gpus_per_node=4, nvlink_domain=8), 512).domain == 8


def test_missing_links_are_asked_for_where_they_are_needed() -> None:
    silent = replace(cluster.load("h100", needs_account=False), network_gbits_per_gpu=0.0)
    assert cluster.links(silent, 8).between_bytes_per_s == 0
    with pytest.raises(UserError, match=r"^network_gbits_per_gpu is missing in the profile, and 16 GPUs are "
                                        r"more than the 8 that NVLink joins; set it \(H100-80GB in servers "
                                        r"of its maker: 400\), or plan with at most 8 GPUs$"):
        cluster.links(silent, 16)
    for name, lacks in (("one-node", "gpu is empty"), ("local", "gpus_per_node is 0")):
        with pytest.raises(UserError, match=f"{lacks} in the profile, .* take a profile with gpu set to one "
                                            "of a100, "):
            cluster.links(cluster.load(name, needs_account=False), 1)


def test_power_of_a_gpu_is_its_share_of_the_node() -> None:
    h100 = cluster.load("h100", needs_account=False)
    assert h100.power_per_gpu_w == 10_200 / 8
    assert replace(h100, node_power_w=8000).power_per_gpu_w == 1000

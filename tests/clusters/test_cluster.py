"""Cluster profiles: the shipped ones are sound, and a mistake in one's own is said in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.clusters import cluster
from megatron_sov.errors import UserError


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


@pytest.mark.parametrize(("text", "sentence"), [
    ("description: x\npartitoin: a", "partitoin: no such setting; did you mean 'partition'"),
    ("description: x\ncontainer: {kind: docker}", 'container.kind = "docker"'),
    ("description: x\ncontainer: {kind: pyxis}", "container.image is empty and container.kind is pyxis"),
    ("description: x\ngpus_per_node: 8\ncpus_per_node: 4",
     "cpus_per_node = 4 must be at least one for each of the 8 ranks"),
    ("description: x", "account is missing; pass --account NAME"),
    ('description: x\naccount: ""\nenvironment: {WANDB_API_KEY: abc}',
     "environment.WANDB_API_KEY looks like a secret"),
    ('description: x\naccount: ""\nenvironment: {"A B": abc}', "environment.A B is not a name of a variable"),
    ('description: x\naccount: ""\nmax_failures: 0', "max_failures = 0 must be at least 1"),
    ("description: x\ntime_limit: 2:00:00",
     "line 2: time_limit = 7200 must be text; put it in double quotes"),
    ('description: x\naccount: ""\nsignal_lead_s: 70000',
     "signal_lead_s = 70000 must lie between 1 and 65535"),
    ('description: x\naccount: ""\nscratch: $SLURM_TMPDIR', "scratch = '$SLURM_TMPDIR' must begin with /"),
    ('description: x\naccount: ""\npreflight: {max_matmul_ratio: 0.9}',
     "preflight.max_matmul_ratio = 0.9 must be above 1"),
    ('description: x\naccount: ""\npreflight: {max_clock_skew_s: .nan}',
     "preflight.max_clock_skew_s = nan must be positive"),
    ('description: x\naccount: ""\ngpu: H100-80GB',
     "gpu = 'H100-80GB' is not in the table; did you mean 'h100'? (GPUs: a100, "),
    ('description: x\naccount: ""\ngpu: b20', "gpu = 'b20' is not in the table; did you mean 'b200'?"),
    ('description: x\naccount: ""\nnetwork_gbits_per_gpu: -1',
     "network_gbits_per_gpu = -1.0 must be a number from 0 to 1e+09"),
    ('description: x\naccount: ""\nrestart_s: .inf', "restart_s = inf must be a number from 0 to 1e+09"),
    ('description: x\naccount: ""\npue: 0.9', "pue = 0.9 must be at least 1"),
    ('description: x\naccount: ""\nprice_per_gpu_hour: cheap', 'gpu_hour = "cheap" must be a number'),
    ("a: [", "is no YAML"),
    ("5", "5 must be an object of settings"),
])
def test_a_mistake_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        cluster.load(str(file))
    assert sentence in str(e.value) and "\n" not in str(e.value)


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

"""Cluster profiles: shipped profiles are valid, and a mistake in a user's profile is one message."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.plan.search.recommended_layouts import RECOMMENDED
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS, default_links, find_device_chip
from megatron_sov.work.clusters.units import GIB


def test_package_contains_nine_profiles() -> None:
    assert cluster.list_profiles() == ["a100", "b200", "b300", "gb200", "gb300", "h100", "h200", "local",
                                       "one-node"]
    for name in cluster.list_profiles():
        profile = cluster.load_profile(name, account="me")
        assert profile.problems() == [] and len(profile.description) > 20


def test_options_override_profile() -> None:
    profile = cluster.load_profile("h100", account="me", partition="long")
    assert (profile.account, profile.partition) == ("me", "long")
    assert cluster.load_profile("local", account=None, partition=None).account == ""
    assert (profile.tasks_per_node, profile.cpus_per_task) == (8, 14)


@pytest.mark.each(("text", "code", "key"), [
    ("partitoin: a", "unknown", "partitoin"),
    ("container: {kind: docker}", "choice", "container.kind"),
    ("container: {kind: pyxis}", "rule", "container.image"),
    ("gpus_per_node: 8\ncpus_per_node: 4", "rule", "cpus_per_node"),
    ("account: null", "missing", "account"),
    ("environment: {WANDB_API_KEY: abc}", "bound", "environment.WANDB_API_KEY"),
    ('environment: {"A B": abc}', "bound", "environment.A B"),
    ("time_limit: 120", "type", "time_limit"),
    ("scratch: $SLURM_TMPDIR", "bound", "scratch"),
    ("preflight: {max_matmul_ratio: 0.9}", "bound", "preflight.max_matmul_ratio"),
    ("gpu: b20", "choice", "gpu"),
    ("a: [", "file", ""),
])
def test_invalid_profile_field_is_reported(tmp_path: Path, text: str, code: str, key: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["description: x", *([] if "account" in text else ['account: ""']), text]))
    with pytest.raises(SettingsError) as e:
        cluster.load_profile(str(file))
    assert e.value.codes == [(code, key)]
    assert str(e.value).startswith(f"--cluster {file}")
    assert "\n" not in str(e.value) and "abc" not in str(e.value)


def test_time_limit_needs_no_quotes(tmp_path: Path) -> None:
    """YAML 1.1 would parse the time as 7200."""
    file = tmp_path / "mine.yaml"
    file.write_text('description: x\naccount: ""\ntime_limit: 2:00:00')
    assert cluster.load_profile(str(file)).time_limit == "2:00:00"


@pytest.mark.each(("content", "kind", "message"), [
    (b'description: x\naccount: ""\ngpu: H100-80GB', SettingsError,
     r"must be one of a100, .*; did you mean 'h100'\?"),
    (b"\xff\xfe", UserError, r"mine.yaml: is not valid UTF-8 \(byte 0 is 0xff\)")])
def test_error_of_a_profile_file_names_the_fix(tmp_path: Path, content: bytes, kind: type[Exception],
                                               message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(kind, match=message):
        cluster.load_profile(str(tmp_path / "mine.yaml"))


@pytest.mark.each(("text", "seconds"), [  # the forms of sbatch's manual
    ("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400),
    ("1-12:30:15", 131415), ("0", float("inf")), ("UNLIMITED", float("inf")),
])
def test_time_limits_follow_slurm(text: str, seconds: float) -> None:
    assert cluster.parse_time_limit(text) == seconds


@pytest.mark.each("text", ["soon", "", "1:2:3:4", "-5", "1.5", "2h", "1-"])
def test_invalid_time_limits_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="must be minutes, H:MM:SS or D-HH:MM:SS"):
        cluster.parse_time_limit(text)


def test_unknown_profile_error_suggests_nearest() -> None:
    with pytest.raises(UserError, match=r"--cluster h10: there is no such profile; did you mean 'h100'\?"):
        cluster.load_profile("h10")
    with pytest.raises(UserError, match=r"--cluster nowhere.yaml: does not exist"):
        cluster.load_profile("nowhere.yaml")


def test_profile_links() -> None:
    h100 = cluster.load_profile("h100", needs_account=False)
    result = cluster.compute_links(h100, 512)
    assert (result.domain, result.inside_bytes_per_s, result.between_bytes_per_s) == (8, 450e9, 50e9)
    assert cluster.compute_links(cluster.load_profile("gb200", needs_account=False), 512).domain == 72
    # half a server has half of its GPUs in a domain, unless the profile says otherwise
    assert cluster.compute_links(replace(h100, gpus_per_node=4), 512).domain == 4
    assert cluster.compute_links(replace(h100, gpus_per_node=4, nvlink_domain=8), 512).domain == 8


def test_missing_network_bandwidth_is_rejected_beyond_domain() -> None:
    profile = replace(cluster.load_profile("h100", needs_account=False), network_gbits_per_gpu=0.0)
    assert cluster.compute_links(profile, 8).between_bytes_per_s == 0
    with pytest.raises(UserError, match=r"^network_gbits_per_gpu is missing in the profile, and 16 GPUs are "
                                        r"more than the 8 that NVLink joins; set it \(H100-80GB in servers "
                                        r"of its maker: 400\), or plan with at most 8 GPUs$"):
        cluster.compute_links(profile, 16)
    for name, reason in (("one-node", "gpu is empty"), ("local", "gpus_per_node is 0")):
        with pytest.raises(UserError, match=f"{reason} in the profile, .* use a profile with gpu set to one "
                                            "of a100, "):
            cluster.compute_links(cluster.load_profile(name, needs_account=False), 1)


# GPUs as data: each figure has a source and agrees with its neighbours; names are found as people write
# them.


FIGURES = {"tflops", "hbm", "nvlink", "memory", "network", "power", "price"}


@pytest.mark.each("key", CHIPS)
def test_chip_figures_have_sources_and_are_plausible(key: str) -> None:
    chip = CHIPS[key]
    assert set(chip.sources) == FIGURES and all(len(source) > 8 for source in chip.sources.values())
    # tensor cores double with each halving of the width, or have no such products; B300 trebles for FP4
    assert chip.fp8_flops_per_s in (0, pytest.approx(2 * chip.bf16_flops_per_s, rel=1e-3))
    assert chip.fp4_flops_per_s in (0, 2 * chip.fp8_flops_per_s, 3 * chip.fp8_flops_per_s)
    # memory as CUDA has it is a little less than the name says
    named_gb = int(chip.name.split("-")[1].removesuffix("GB"))
    assert 0.95 < chip.memory_bytes / (named_gb * 1e9) < 1.08
    assert chip.price.low < chip.price.typical < chip.price.high and chip.price.date >= "2024-12"
    assert chip.network_bytes_per_s < chip.nvlink_bytes_per_s < chip.hbm_bytes_per_s


def test_chip_figures_match_datasheets() -> None:
    """H100 SXM: 1,979 TFLOP/s in bf16 with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways; GB300 NVL72:
    1,080 PFLOP/s in dense FP4 and 130 TB/s of NVLink for 72."""
    h100, gb300 = CHIPS["h100"], CHIPS["gb300"]
    assert 2 * h100.bf16_flops_per_s == pytest.approx(1979e12, rel=1e-3)
    assert (h100.hbm_bytes_per_s, 2 * h100.nvlink_bytes_per_s) == (3.35e12, 900e9)
    assert 72 * gb300.fp4_flops_per_s == pytest.approx(1080e15)
    assert 72 * 2 * gb300.nvlink_bytes_per_s == pytest.approx(130e12, rel=0.01)
    assert (CHIPS["h100"].memory_bytes, CHIPS["h200"].memory_bytes) == (79 * GIB, 139 * GIB)


@pytest.mark.each(("name", "key"), [
    ("H100-80GB", "h100"), ("h100", "h100"), ("A100-40GB", "a100-40"), ("A100", "a100"), ("GB300", "gb300"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B300 SXM6 AC", "b300"),
    ("H100-96GB(HBM2e500W)", "h100-96"), ("AMD Instinct MI300X", "mi300x")])
def test_chip_is_resolved_by_every_alias(name: str, key: str) -> None:
    assert find_device_chip(name) is CHIPS[key] and hash(CHIPS[key]) == hash(replace(CHIPS[key]))


def test_unknown_chips_are_rejected() -> None:
    for name in ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", ""):
        assert find_device_chip(name) is None


def test_unsupported_precision_error_names_alternatives() -> None:
    assert CHIPS["b200"].flops_per_s("fp4") == 9e15
    with pytest.raises(UserError, match=r"^fp8 on A100-80GB: is not supported by its tensor cores \(they "
                                        r"support bf16\); plan with bf16, or with one of h100, h200"):
        CHIPS["a100"].flops_per_s("fp8")
    with pytest.raises(UserError, match=r"\(they support bf16 and fp8\); plan with fp8, or with one of b200"):
        CHIPS["mi300x"].flops_per_s("fp4")
    with pytest.raises(UserError, match="int3 on H100-80GB: is not supported by its tensor cores"):
        CHIPS["h100"].flops_per_s("int3")


def test_recommended_layouts_name_known_chips() -> None:
    assert {gpu for layouts in RECOMMENDED.values() for gpu in layouts} <= set(CHIPS)


def test_packaged_profiles_have_vendor_links() -> None:
    for name in set(CHIPS) & set(cluster.list_profiles()):
        profile = cluster.load_profile(name, needs_account=False)
        expected = default_links(CHIPS[name])
        result = cluster.compute_links(profile, 1024)
        # the one for H200 is a cluster with RoCE
        assert replace(result, between_latency_s=0) == replace(expected, between_latency_s=0)
        assert result.between_latency_s == pytest.approx(5.6e-6 if name == "h200" else 3.7e-6)


def test_docs_page_shows_chip_table() -> None:
    page = (Path(__file__).parents[3] / "docs/plan.md").read_text()
    rows = {cells[1].strip(" `"): [cell.strip() for cell in cells[2:-1]] for cells in
            (line.split("|") for line in page.splitlines()) if len(cells) == 11 and "`" in cells[1]}
    rows.pop("gpu")
    assert set(rows) == set(CHIPS)
    for key, row in rows.items():
        c = CHIPS[key]
        peaks = (c.bf16_flops_per_s, c.fp8_flops_per_s, c.fp4_flops_per_s)
        price = ", ".join(f"{dollars:.2f}" for dollars in (c.price.low, c.price.typical, c.price.high))
        assert row == [", ".join(f"{peak / 1e12:.0f}" if peak else "-" for peak in peaks),
                       str(c.memory_bytes // GIB), f"{c.hbm_bytes_per_s / 1e9:.0f}",
                       f"{c.nvlink_bytes_per_s / 1e9:.0f}", str(c.nvlink_domain),
                       f"{c.network_bytes_per_s * 8 / 1e9:.0f}", f"{c.power_w:.0f}",
                       price + " (a guess)" * c.price.guess]

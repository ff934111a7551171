"""Averages of checkpoints equal, bit for bit, the mean that torch computes in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tqdm import tqdm

from megatron_sov import convert
from megatron_sov.base.artifacts import create_artifact, find_damaged_files, manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.convert import averaging, hf_import
from megatron_sov.convert.averaging import choose_checkpoints, compute_weights
from megatron_sov.convert.peft import from_peft
from tests.convert.hf_folders import save_tensors


def read_hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint under their Hugging Face names."""
    out = folder.with_name(f"{folder.name}-hf")
    convert.to_hf(folder, out)
    return load_file(out / "model.safetensors")


def read_source_tensors(experts: list[Path]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of the Hugging Face folders from which the checkpoints were imported."""
    return [load_file(path.with_name(f"hf-{path.name}") / "model.safetensors") for path in experts]


@pytest.fixture(scope="module")
def experts(exaone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of a mixture of experts with router biases and multi-token prediction."""
    folder = tmp_path_factory.mktemp("experts")
    tensors = load_file(exaone_dir / "model.safetensors")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(exaone_dir, folder / f"hf-{seed}")
        save_tensors(folder / f"hf-{seed}", {
            name: t + torch.randn(t.shape, generator=generator).to(t.dtype) * 0.1
            for name, t in tensors.items()})
        convert.from_hf(folder / f"hf-{seed}", folder / f"{seed}")
    return [folder / str(seed) for seed in range(3)]


def test_equal_weights_give_the_bit_exact_mean(experts: list[Path], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "MAX_SLAB_ELEMENTS", 700)  # less than a matrix, not a multiple of a row
    convert.average([(path, 1.0) for path in experts], tmp_path / "merged")
    merged, sources = read_hf_tensors(tmp_path / "merged"), read_source_tensors(experts)
    assert any("e_score_correction_bias" in name for name in merged) and "mtp.fc.weight" in merged
    for name, tensor in merged.items():
        mean = torch.stack([source[name] for source in sources]).double().mean(dim=0)
        assert tensor.equal(mean.to(sources[0][name].dtype)), name
    assert find_damaged_files(tmp_path / "merged") == []
    manifest = read_manifest(tmp_path / "merged", "checkpoint")
    assert [m["manifest_sha256"] for m in manifest.content["merged"]] == list(map(manifest_sha256, experts))
    assert [i["path"] for i in manifest.inputs] == list(map(str, experts))
    assert (tmp_path / "merged/tokenizer/tokenizer.json").is_file()


class ShownBar(tqdm):
    """A progress bar that is shown without a terminal; `last` is the newest one."""

    last: ShownBar

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"disable": False})
        ShownBar.last = self


def test_weights_are_normalized_and_killed_averaging_resumes(experts: list[Path], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [3.0, 0.5]
    monkeypatch.setattr(hf_import, "MAX_FILE_BYTES", 100_000)
    average_block, blocks = averaging.average_block, 0

    def average_until_killed(*arguments: object) -> torch.Tensor:
        nonlocal blocks
        if (blocks := blocks + 1) == 40:
            raise KeyboardInterrupt
        return average_block(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(averaging, "average_block", average_until_killed)
        with pytest.raises(KeyboardInterrupt):
            convert.average(list(zip(experts, weights, strict=False)), tmp_path / "merged")
    assert (tmp_path / ".merged.work/records").read_bytes()
    monkeypatch.setattr(hf_import, "tqdm", ShownBar)
    convert.average(list(zip(experts, weights, strict=False)), tmp_path / "merged")
    assert 0 < ShownBar.last.initial < ShownBar.last.n == ShownBar.last.total
    merged, sources = read_hf_tensors(tmp_path / "merged"), read_source_tensors(experts[:2])
    for name, tensor in merged.items():
        first, second = (source[name].double() for source in sources)
        assert tensor.equal(((3 * first + 0.5 * second) / 3.5).to(tensor.dtype)), name


def write_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Write a random adapter of the query projections in PEFT's format and import it."""
    generator, peft = torch.Generator().manual_seed(seed), folder / f"peft-{seed}"
    peft.mkdir()
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (64, 2)}
    save_file({name.format(layer, of): torch.randn(shape, generator=generator).bfloat16()
               for layer in range(2) for of, shape in shapes.items()}, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    from_peft(peft, folder / f"adapter-{seed}", base)
    return folder / f"adapter-{seed}"


def check_refused(message: str, *paths: Path) -> None:
    out = paths[0].with_name("never")
    with pytest.raises(UserError, match=message):
        convert.average([(path, 1.0) for path in paths], out)
    assert not out.exists() and not out.with_name(".never.work").exists()


def test_incompatible_checkpoints_are_not_averaged(experts: list[Path], solar_dir: Path,
                                                   tmp_path: Path) -> None:
    convert.from_hf(solar_dir, tmp_path / "solar")
    check_refused("a mean needs at least two checkpoints", experts[0])
    check_refused("model.family = solar_open, but .* has exaone_moe", experts[0], tmp_path / "solar")
    shutil.copytree(experts[1], tmp_path / "renamed")
    other = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "b": 2}, unk_token="b"))
    other.save(str(tmp_path / "renamed/tokenizer/tokenizer.json"))
    check_refused("1 ids mean other tokens than in .*2: 'b' here, 'a' there", experts[0],
                  tmp_path / "renamed")
    shutil.copytree(experts[1], tmp_path / "template")
    (tmp_path / "template/tokenizer/chat_template.jinja").write_text("{{ messages }}")
    check_refused(r"template/tokenizer: chat_template.jinja .* differs from that of .*; only checkpoints "
                  "with the same tokenizer can be averaged", experts[0], tmp_path / "template")
    settings = read_manifest(experts[1]).settings
    with create_artifact(tmp_path / "adapter", "checkpoint") as artifact:
        artifact.content = {"step": 0, "base": {"path": str(experts[0]), "sha256": "0" * 64}}
        artifact.settings = settings
    check_refused("contains an adapter of .*, but .* contains all weights", experts[0], tmp_path / "adapter")
    with pytest.raises(UserError, match="its weight -1 must"):
        convert.average([(experts[0], 1.0), (experts[1], -1.0)], tmp_path / "never")


def test_damaged_source_writes_no_checkpoint(experts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(experts[1], tmp_path / "damaged")
    (file,) = (tmp_path / "damaged/model").rglob("*.safetensors")
    with open(file, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\xee")
    check_refused("differs from the hash", experts[0], tmp_path / "damaged")


def test_adapters_are_averaged_as_merged_models(solar_dir: Path, tmp_path: Path) -> None:
    convert.from_hf(solar_dir, tmp_path / "base")
    paths = [write_adapter(tmp_path, tmp_path / "base", seed) for seed in range(2)]
    convert.average([(path, 1.0) for path in paths], tmp_path / "merged")
    merged, base = read_hf_tensors(tmp_path / "merged"), read_hf_tensors(tmp_path / "base")
    sources = [read_hf_tensors(path) for path in paths]
    for name, tensor in merged.items():
        if "q_proj" in name:
            mean = torch.stack([source[name] for source in sources]).double().mean(dim=0).float()
            assert tensor.equal(mean) and not mean.equal(base[name].float())
        else:
            assert tensor.equal(base[name].float()), name
    manifest = read_manifest(tmp_path / "merged")
    assert manifest.settings["lora"]["rank"] == 0
    assert [Path(i["path"]).name for i in manifest.inputs] == ["adapter-0", "base", "adapter-1", "base"]


# Which of a run's checkpoints are averaged, and how much each counts.


def test_ema_weights_equal_a_moving_average() -> None:
    values, decay, moving_average = [float(i % 7) for i in range(60)], 0.8, 0.0
    for value in values:
        moving_average = decay * moving_average + (1 - decay) * value
    weights = compute_weights(len(values), "ema", decay)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert mean == pytest.approx(moving_average, rel=1e-5)
    assert compute_weights(3, "uniform", decay) == [1, 1, 1]
    assert compute_weights(3, "linear", decay) == [1, 2, 3]


def test_choose_checkpoints_in_a_window_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [tmp_path / f"step-{n}" for n in (10, 20, 30, 40)]
    monkeypatch.setattr(averaging, "list_complete", lambda folder: steps)
    assert choose_checkpoints(tmp_path, None, (20, None)) == [(p, 1.0) for p in steps[1:]]
    assert choose_checkpoints(tmp_path, 2, (None, 30), "linear") == [(steps[1], 1.0), (steps[2], 2.0)]
    assert choose_checkpoints(tmp_path, 3, kind="ema", decay=0.5) == [
        (steps[1], 0.25), (steps[2], 0.5), (steps[3], 1.0)]
    for arguments, sentence in (
            ((5,), r"--last 5: must be at least 2 and at most 4, the number of complete checkpoints of \S+$"),
            ((None, (35, None)), "has 1 complete checkpoints between steps 35 and the last, but a mean"),
            ((None, (None, None), "ema", 0.0), "--decay 0.0: must be above 0")):
        with pytest.raises(UserError, match=sentence):
            choose_checkpoints(tmp_path, *arguments)  # type: ignore[arg-type]

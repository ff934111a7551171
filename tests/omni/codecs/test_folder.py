"""Codecs on disk: what is written is read, and what others wrote is refused in one sentence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, change, plain
from megatron_sov.omni.codecs.folder import KIND, WEIGHTS, inspected, open_codec, save_codec
from megatron_sov.omni.codecs.quantised import FSQSettings, FSQTokenizer, SimVQSettings, SimVQTokenizer
from megatron_sov.omni.codecs.training.tokenizers import ImageTokenizerTraining

SETTINGS = SimVQSettings(side_pixels=8, grid=2, width=8, num_layers=1, num_heads=2, code_width=4,
                         codebook_size=16)


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_codec(tmp_path / "codec", "simvq", SimVQTokenizer(SETTINGS), facts={"heldout": {"psnr_db": 20.5}})
    return tmp_path / "codec"


def written(folder: Path, content: Any, state: dict[str, torch.Tensor]) -> Path:
    """Write an artifact as somebody else would."""
    with new_artifact(folder, KIND) as writer:
        save_file(state, writer.path / WEIGHTS)
        writer.content = content
    return folder


def test_a_codec_is_read_as_it_was_written(codec: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, read = SimVQTokenizer(SETTINGS), open_codec(codec)
    pictures = torch.rand(2, 3, 8, 8)
    assert torch.equal(read.encode(pictures), own.eval().encode(pictures))
    assert (read.settings, read.training) == (SETTINGS, False)
    assert not any(p.requires_grad for p in read.parameters())
    assert inspected(codec) == {"codec": "simvq", "config": plain(SETTINGS), "heldout": {"psnr_db": 20.5},
                                "num_parameters": sum(t.numel() for t in own.state_dict().values())}
    sounds = FSQTokenizer(FSQSettings(num_mels=8, width=4, num_blocks=1, levels=(3, 3)))
    save_codec(tmp_path / "sounds", "fsq", sounds)
    noise = torch.rand(2000) - 0.5
    assert torch.equal(open_codec(tmp_path / "sounds").encode(noise), sounds.eval().encode(noise))
    with pytest.raises(UserError, match=r"is a codec of kind 'fsq' where 'simvq' is needed"):
        open_codec(tmp_path / "sounds", kind="simvq")


@pytest.mark.parametrize(("content", "said"), [
    ([], "names no kind of codec"), ({"codec": 3}, "names no kind of codec"),
    ({"codec": "os:system", "config": {}}, "'os:system' is no kind of codec; there are simvq"),
    ({"codec": "simvq"}, "null must be an object of settings"),
    ({"codec": "simvq", "config": {"width": "8"}}, 'width = "8" must be a whole number'),
    ({"codec": "simvq", "config": {"wdith": 8}}, "wdith: no such setting; did you mean 'width'?"),
    ({"codec": "simvq", "config": {"width": 10**30}}, "width"),
    ({"codec": "simvq", "config": {"codebook_size": 10**12}},
     "codebook_size = 1000000000000 must be at most 1,048,576"),
    ({"codec": "fsq", "config": {"levels": [10**9] * 3}}, "must be at most 1,024")])
def test_a_hostile_manifest_is_one_sentence(tmp_path: Path, content: Any, said: str) -> None:
    folder = written(tmp_path / "bad", content, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        open_codec(folder)
    assert str(folder) in str(caught.value)


def test_weights_that_settings_do_not_ask_for_reserve_nothing(codec: Path, tmp_path: Path) -> None:
    """A manifest may say 16,384 wide and 100 layers: none such is made, for the file does not have it."""
    state = load_file(codec / WEIGHTS)
    huge = replace(SETTINGS, width=16_384, num_layers=100)
    cases: list[tuple[SimVQSettings, dict[str, torch.Tensor], str]] = [
        (huge, state, "settings say"),
        (SETTINGS, {k: v for k, v in state.items() if k != "to_code.bias"}, "lacks to_code.bias"),
        (SETTINGS, {**state, "more": torch.zeros(1)}, "has more, which its settings do not ask for"),
        (SETTINGS, {**state, "to_code.bias": torch.zeros(4, dtype=torch.int64)}, "numbers of kind I64"),
        (SETTINGS, {**state, "to_code.bias": torch.tensor([0.0, 1, float("nan"), 2])}, "are not finite")]
    for i, (settings, tensors, said) in enumerate(cases):
        folder = written(tmp_path / str(i), {"codec": "simvq", "config": plain(settings)}, tensors)
        with pytest.raises(UserError, match=said):
            open_codec(folder)


def test_a_flipped_bit_is_seen(codec: Path) -> None:
    """In the exponent of a weight, which leaves a number of the right kind."""
    weights = bytearray((codec / WEIGHTS).read_bytes())
    weights[-1] ^= 0x40
    (codec / WEIGHTS).write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors: its content differs from the hash in the "
                                        "manifest; make the codec again"):
        open_codec(codec)


def test_a_damaged_file_is_one_sentence(codec: Path, tmp_path: Path) -> None:
    for damage in (b"", b"\x80\x04N.", (codec / WEIGHTS).read_bytes()[:-5]):
        (codec / WEIGHTS).write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes, the manifest says"):
            open_codec(codec)
        with pytest.raises(UserError, match="cannot be read as a safetensors file"):
            inspected(codec)
    (codec / WEIGHTS).unlink()
    (tmp_path / "elsewhere").write_bytes(b"")
    (codec / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        open_codec(codec)
    with pytest.raises(UserError, match="does not exist, so it is not a 'codec' artifact"):
        open_codec(tmp_path / "none")


def test_settings_are_changed_by_key_and_value() -> None:
    changed = change(ImageTokenizerTraining(), ["model.grid=8", "learning.learning_rate=1e-2"])
    assert (changed.model.grid, changed.learning.learning_rate, changed.model.width) == (8, 0.01, 384)
    assert json.loads(json.dumps(plain(changed)))["model"]["grid"] == 8
    for setting, found in [("grid=8", ("unknown", "grid")), ("model.gird=8", ("unknown", "model.gird")),
                           ("learning=3", ("type", "learning"))]:
        with pytest.raises(SettingsError) as e:
            change(ImageTokenizerTraining(), [setting])
        assert e.value.codes == [found]
    for setting, said in [("model.grid=7", "model.side_pixels = 384 must be a multiple of grid = 7"),
                          ("learning.steps=NaN", "steps")]:
        with pytest.raises(UserError, match=re.escape(said)):
            change(ImageTokenizerTraining(), [setting])

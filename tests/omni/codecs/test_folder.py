"""Folders of codecs: a saved codec opens unchanged; hostile manifests and damaged weights are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import to_plain_values
from megatron_sov.omni.codecs.folder import ARTIFACT_KIND, WEIGHTS, open_codec, save_codec
from megatron_sov.omni.codecs.ta_tok import SiglipSettings, TATok, TATokSettings

SETTINGS = TATokSettings(side_pixels=8, encoder=SiglipSettings(
    patch_pixels=4, width=8, feed_forward_width=8, num_layers=1, num_heads=2), code_width=4, codebook_size=16)


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """The folder of a tiny TA-Tok codec."""
    torch.manual_seed(0)
    save_codec(tmp_path / "codec", "ta-tok", TATok(SETTINGS))
    return tmp_path / "codec"


def write_codec(folder: Path, content: Any, state: dict[str, torch.Tensor]) -> Path:
    """Write a codec artifact with any manifest content and weights, and return its folder."""
    with create_artifact(folder, ARTIFACT_KIND) as writer:
        save_file(state, writer.path / WEIGHTS)
        writer.content = content
    return folder


def test_saved_codec_opens_with_the_same_weights(codec: Path) -> None:
    torch.manual_seed(0)
    original, opened = TATok(SETTINGS), open_codec(codec)
    pictures = torch.rand(2, 3, 8, 8)
    assert torch.equal(opened.encode(pictures), original.eval().encode(pictures))
    assert (opened.settings, opened.training) == (SETTINGS, False)
    assert not any(p.requires_grad for p in opened.parameters())


@pytest.mark.each(("content", "message"), [
    ([], "names no kind of codec"), ({"codec": 3}, "names no kind of codec"),
    ({"codec": "os:system", "config": {}}, "'os:system' is not a kind of codec; there are vqmodel"),
    ({"codec": "ta-tok"}, "null must be an object of settings"),
    ({"codec": "ta-tok", "config": {"code_width": "8"}}, 'code_width = "8" must be a whole number'),
    ({"codec": "ta-tok", "config": {"code_wdith": 8}}, "code_wdith: no such setting; did you mean"),
    ({"codec": "ta-tok", "config": {"code_width": 10**30}}, "code_width"),
    ({"codec": "ta-tok", "config": {"codebook_size": 10**12}},
     "codebook_size = 1000000000000 must be at most 1,048,576"),
    *(({"codec": removed, "config": {}},
       f"'{removed}' is not a kind of codec; it was removed in this version: import a codec")
      for removed in ("simvq", "fsq", "dit", "unit-bigvgan", "janus-vq"))])
def test_hostile_manifests_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    folder = write_codec(tmp_path / "bad", content, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_codec(folder)
    assert str(folder) in str(caught.value)


def test_weights_must_fit_the_settings(codec: Path, tmp_path: Path) -> None:
    state = load_file(codec / WEIGHTS)
    huge = replace(SETTINGS, code_width=16_384, codebook_size=1 << 20)
    cases: list[tuple[TATokSettings, dict[str, torch.Tensor], str]] = [
        (huge, state, "settings say"),
        (SETTINGS, {k: v for k, v in state.items() if k != "to_code.bias"}, "lacks to_code.bias"),
        (SETTINGS, {**state, "more": torch.zeros(1)}, "has more, which its settings do not ask for"),
        (SETTINGS, {**state, "to_code.bias": torch.zeros(4, dtype=torch.int64)}, "numbers of kind I64"),
        (SETTINGS, {**state, "to_code.bias": torch.tensor([0.0, 1, float("nan"), 2])}, "are not finite")]
    for i, (settings, tensors, message) in enumerate(cases):
        content = {"codec": "ta-tok", "config": to_plain_values(settings)}
        folder = write_codec(tmp_path / str(i), content, tensors)
        with pytest.raises(UserError, match=message):
            open_codec(folder)


def test_flipped_bit_is_detected(codec: Path) -> None:
    """The flipped bit is in an exponent, so the weight stays finite."""
    weights = bytearray((codec / WEIGHTS).read_bytes())
    weights[-1] ^= 0x40
    (codec / WEIGHTS).write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors: its content differs"):
        open_codec(codec)


def test_damaged_weights_are_refused(codec: Path, tmp_path: Path) -> None:
    for damage in (b"", b"\x80\x04N.", (codec / WEIGHTS).read_bytes()[:-5]):
        (codec / WEIGHTS).write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes"):
            open_codec(codec)
    (codec / WEIGHTS).unlink()
    (tmp_path / "elsewhere").write_bytes(b"")
    (codec / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        open_codec(codec)
    with pytest.raises(UserError, match="'codec' artifact"):
        open_codec(tmp_path / "none")

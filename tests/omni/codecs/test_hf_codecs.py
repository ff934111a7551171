"""Codecs imported from folders of transformers and diffusers encode and decode as the official classes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs.folder import WEIGHTS, open_codec
from megatron_sov.omni.codecs.hf_codecs import DacCodec, HfAudioSettings
from megatron_sov.omni.codecs.published import import_codec
from tests.omni.codecs.test_folder import write_codec
from tests.omni.hf_folders import BUILDERS, build_vqmodel, save_network

PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
"""Three pictures with values from 0 to 1."""
SOUND = torch.rand(7001, generator=torch.Generator().manual_seed(2)) - 0.5


def test_picture_codec_equals_the_official_class(tmp_path: Path) -> None:
    network = save_network("vqmodel", tmp_path / "hf")
    pixels = PICTURES * 2 - 1
    with torch.no_grad():
        ids = network.quantize(network.encode(pixels).latents)[2][2].view(3, -1)
        decoded = network(pixels).sample
    import_codec("vqmodel", tmp_path / "hf", tmp_path / "codec")
    codec = open_codec(tmp_path / "codec")
    assert (codec.side_pixels, codec.grid, codec.codebook_size) == (16, 4, 16)
    result = codec.encode(PICTURES)
    assert torch.equal(result, ids) and result.dtype == torch.int64 and len(result.unique()) > 1
    pictures = codec.decode(result)
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert pictures.shape == PICTURES.shape and float(pictures.std()) > 0.01


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize("kind", ["dac", "mimi"])
@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_sound_codecs_equal_official_classes(tmp_path: Path, kind: str, num_codebooks: int) -> None:
    network = save_network(kind, tmp_path / "hf")
    import_codec(kind, tmp_path / "hf", tmp_path / "codec", num_codebooks=num_codebooks)
    codec = open_codec(tmp_path / "codec")
    padded = torch.nn.functional.pad(SOUND, (0, -len(SOUND) % 640))[None, None]  # 11 frames of 640 samples
    with torch.no_grad():
        codes = network.encode(padded, **{codec.CODEBOOKS_ARGUMENT: num_codebooks}).audio_codes
        decoded = network.decode(audio_codes=codes).audio_values.flatten()
    size = {"dac": 512, "mimi": 64}[kind]
    assert (codec.sample_rate_hz, codec.codebook_size) == (16_000, size * num_codebooks)
    ids = codec.encode(SOUND)
    assert codes.shape == (1, num_codebooks, 11) and len(ids) == 11 * num_codebooks
    rows = ids.view(11, num_codebooks)
    assert torch.equal(rows % size, codes[0].T)
    assert torch.equal(rows // size, torch.arange(num_codebooks).expand(11, -1))
    assert len(ids.unique()) > 3 or kind == "mimi"
    torch.testing.assert_close(codec.decode(ids), decoded.clamp(-1, 1))
    # an incomplete frame is dropped, and an id is read modulo the codebook size
    torch.testing.assert_close(codec.decode(torch.cat([ids, ids[:num_codebooks - 1]])), decoded.clamp(-1, 1))
    torch.testing.assert_close(codec.decode(ids % size), decoded.clamp(-1, 1))
    assert len(codec.decode(ids[:0])) == 0 and len(codec.encode(SOUND[:0])) == 0


def test_long_sounds_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_network("dac", tmp_path / "hf")
    import_codec("dac", tmp_path / "hf", tmp_path / "codec")
    codec = open_codec(tmp_path / "codec")
    codec.max_piece_s = 0.1  # 1,600 samples: two whole frames of 640
    pieces = [codec.encode(SOUND[start:start + 1280]) for start in range(0, len(SOUND), 1280)]
    assert torch.equal(codec.encode(SOUND), torch.cat(pieces))


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.each(("kind", "fields", "message"), [
    ("vqmodel", {"num_vq_embeddings": 17}, "17"),
    ("dac", {"codebook_size": 2**60}, "is too large for a codec"),
    ("mimi", {"rope_parameters": {"rope_type": "none"}}, "cannot load it")])
def test_invalid_configs_are_refused(tmp_path: Path, kind: str, fields: dict[str, Any], message: str) -> None:
    save_network(kind, tmp_path / "hf")
    change_config(tmp_path / "hf", **fields)
    with pytest.raises(UserError, match=message):
        import_codec(kind, tmp_path / "hf", tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


@pytest.mark.each("kind", list(BUILDERS))
def test_incomplete_weights_are_refused(tmp_path: Path, kind: str) -> None:
    save_network(kind, tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file, {"format": "pt"})
    with pytest.raises(UserError, match="1 missing"):
        import_codec(kind, tmp_path / "hf", tmp_path / "codec")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "hf"))):
        import_codec(kind, tmp_path / "hf", tmp_path / "codec")


@pytest.mark.tier1_cases(4)
@pytest.mark.parametrize(("config", "message"), [
    ({"auto_map": {"AutoModel": "evil.Model"}}, "config.auto_map: is not a size of a codec"),
    ({"nested": [{"_target_": "os.system"}]}, "config.nested.0._target_"),
    ({"layers_per_block": 900_000}, "tensors"), ({"block_out_channels": [1_000_000] * 3}, "has the shape"),
    ({"block_out_channels": "x"}, "cannot build VQModel"), ({"num_vq_embeddings": 17}, "has the shape"),
    ({"in_channels": "${oc.env:HOME}"}, "cannot build VQModel")])
def test_hostile_manifests_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    save_network("vqmodel", tmp_path / "hf")
    import_codec("vqmodel", tmp_path / "hf", tmp_path / "codec")
    content = read_manifest(tmp_path / "codec", "codec").content
    content["config"]["config"] |= config
    bad = write_codec(tmp_path / "bad", content, load_file(tmp_path / "codec" / WEIGHTS))
    with pytest.raises(UserError, match=re.escape(message)):
        open_codec(bad)


@pytest.mark.each("rate_hz", [0, -1, None])
def test_sound_codec_needs_a_rate(tmp_path: Path, rate_hz: int | None) -> None:
    save_network("dac", tmp_path / "hf")
    config = DacCodec.from_folder(tmp_path / "hf").settings.config
    with pytest.raises(UserError, match="the codec's configuration"):
        DacCodec(HfAudioSettings({**config, "sampling_rate": rate_hz}))


def test_invalid_side_and_codebook_count_are_refused(tmp_path: Path) -> None:
    save_network("vqmodel", tmp_path / "pictures", lambda: build_vqmodel(40))
    save_network("mimi", tmp_path / "sounds")
    import_codec("vqmodel", tmp_path / "pictures", tmp_path / "codec", side_pixels=32)
    assert open_codec(tmp_path / "codec").grid == 8
    with pytest.raises(UserError, match="side_pixels = 30:"):
        import_codec("vqmodel", tmp_path / "pictures", tmp_path / "other", side_pixels=30)
    with pytest.raises(UserError, match="num_codebooks = 5:"):
        import_codec("mimi", tmp_path / "sounds", tmp_path / "other", num_codebooks=5)
    assert not (tmp_path / "other").exists()

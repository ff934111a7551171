"""A codec that NeMo itself made and saved, heard by our adapter: tokens, embeddings and sound beside NeMo's.

Usage: PYTHONPATH=. PYTHON benchmarks/nemo_codec.py

PYTHON has nemo-toolkit[tts] beside this framework.  The codec is tiny and random, of NeMo's HiFi-GAN networks
and one group of finite scalars, with the discriminator that training has; the file is that of its `save_to`.
A second file names another codec by path, which NeMo would open and unpickle.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MODULES, LOSSES = (f"nemo.collections.tts.{part}" for part in (
    "modules.audio_codec_modules", "losses.audio_codec_loss"))
CONFIG: dict[str, Any] = {
    "sample_rate": 16_000, "samples_per_frame": 8, "commit_loss_scale": 0.0,
    "loss_resolutions": [[64, 16, 64]], "mel_loss_dims": [8],
    "audio_encoder": {"_target_": f"{MODULES}.HiFiGANEncoder", "encoded_dim": 4, "base_channels": 4,
                      "down_sample_rates": [2, 4], "activation": "lrelu"},
    "audio_decoder": {"_target_": f"{MODULES}.HiFiGANDecoder", "up_sample_rates": [4, 2], "input_dim": 4,
                      "base_channels": 16, "activation": "half_snake", "output_activation": "clamp"},
    "vector_quantizer": {"_target_": f"{MODULES}.GroupFiniteScalarQuantizer", "num_groups": 1,
                         "num_levels_per_group": [8, 5, 5, 5]},
    "generator_loss": {"_target_": f"{LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{LOSSES}.DiscriminatorSquaredLoss"},
    "discriminator": {"_target_": f"{MODULES}.Discriminator", "discriminators": [
        {"_target_": f"{MODULES}.MultiResolutionDiscriminatorSTFT", "resolutions": [[64, 16, 64]],
         "stft_bands": [[0.0, 0.5], [0.5, 1.0]]}]}}
PIECES_S = (0.1, 3.3, 31.0)
"""Lengths of sounds; ours are cut into pieces of 30 seconds."""


def nemo_codec() -> Any:
    """Return NeMo's codec, with weights that use many of its tokens."""
    from nemo.collections.tts.models import AudioCodecModel
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    model = AudioCodecModel(cfg=OmegaConf.create(CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in model.audio_encoder.named_parameters():
            if name.endswith("original0"):  # the sizes of rows, which start near nothing
                parameter.fill_(1.5)
    return model


def compare(theirs: Any, ours: Any) -> bool:
    """Print and return whether both do the same with sounds."""
    same = True
    for seconds in PIECES_S:
        draw = torch.Generator().manual_seed(int(10 * seconds))
        sound = torch.randn(int(16_000 * seconds) + 3, generator=draw) * 0.3
        with torch.no_grad():
            expected = torch.cat([
                theirs.encode(audio=part[None], audio_len=torch.tensor([len(part)]))[0][0, 0]
                for part in sound.split(30 * 16_000)]).long()
            ids = ours.encode(sound)
            length = torch.tensor([len(ids)])
            heard, _ = theirs.decode(tokens=expected[None, None], tokens_len=length)
            again, _ = ours.network.decode(tokens=ids[None, None], tokens_len=length)
            vectors = theirs.dequantize(tokens=expected[None, None], tokens_len=length)[0].T
        found = {"tokens": torch.equal(ids, expected), "embeddings": torch.equal(ours.embed(ids), vectors),
                 "sound": torch.equal(heard, again)}
        same &= all(found.values())
        told = ", ".join(f"{what} {'equal' if equal else 'DIFFER'}" for what, equal in found.items())
        print(f"  {seconds:4.1f} s: {len(ids):,} tokens, {len(ids.unique())} of {ours.codebook_size} met; "
              f"{told}")
    return same


def main() -> int:
    """Compare, and try the file that names another; 1: something differs, or is not refused."""
    warnings.simplefilter("ignore")
    from omegaconf import open_dict

    from megatron_sov.base.errors import UserError
    from megatron_sov.omni.codecs.folder import open_codec
    from megatron_sov.omni.codecs.published import import_codec

    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"nemo-toolkit {version('nemo-toolkit')}, on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        file, codec = Path(folder, "tiny.nemo"), Path(folder, "codec")
        theirs = nemo_codec()
        theirs.save_to(str(file))
        import_codec("nemo-audio", file, codec)
        same = compare(theirs, open_codec(codec))
        with open_dict(theirs.cfg):
            theirs.cfg.semantic_codec_path = "beside.nemo"
        theirs.save_to(str(file))
        try:
            import_codec("nemo-audio", file, Path(folder, "other"))
        except UserError as e:
            print(f"  refused: {str(e).partition(': ')[2]}")
            return int(not same)
        print("  a codec that names another by path WAS IMPORTED")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Import of published codecs, TA-Tok and CosyVoice 2, with small doubles of their networks; hostile files."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.published import import_codec


class PublishedTATok(nn.Module):
    """The encoder of csuhan/Tar's `TextAlignedTokenizer`, with its tensor names; ids by largest cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=16, image_size=20,
            patch_size=5))
        self.encode_task_layer = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.decode_task_layer = nn.Sequential(nn.Linear(32, 32))
        self.bottleneck = nn.Module()
        self.bottleneck.in_linear, self.bottleneck.out_linear = nn.Linear(32, 6), nn.Linear(6, 6)
        self.bottleneck.regularizer = nn.Module()
        self.bottleneck.regularizer.embedding = nn.Embedding(40, 6)
        self.bottleneck.regularizer.embedding_proj = nn.Linear(6, 6)
        self.scale_layer = nn.Module()
        self.scale_layer.register_buffer("shift", torch.full((1, 3, 1, 1), 0.5))

    def compute_codes(self) -> torch.Tensor:
        regularizer = self.bottleneck.regularizer
        return F.normalize(regularizer.embedding_proj(regularizer.embedding.weight), dim=-1)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        features = self.encoder((pictures - 0.5) / 0.5, output_hidden_states=True).hidden_states[-2]
        vectors = F.normalize(self.bottleneck.in_linear(self.encode_task_layer(features)), dim=-1)
        return (vectors @ self.compute_codes().T).argmax(-1)


@pytest.fixture
def published_network() -> PublishedTATok:
    """The double of TA-Tok with fixed random weights."""
    torch.manual_seed(0)
    return PublishedTATok().eval().requires_grad_(False)


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_ta_tok_ids_equal_the_authors_code(tmp_path: Path, published_network: PublishedTATok,
                                           form: str) -> None:
    source = tmp_path / "model"
    source.mkdir()
    prefix = "model.discrete_vision_model." if form == "released" else ""
    other_tensors = {"model.language_model.w": torch.zeros(2)} if form == "released" else {}
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in published_network.state_dict().items()}
    save_file(state | other_tensors, source / "model.safetensors")
    import_codec("ta-tok", source, tmp_path / "codec")
    codec = open_codec(tmp_path / "codec")
    pictures = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    ids = codec.encode(pictures)
    assert torch.equal(ids, published_network.encode(pictures))
    assert len(ids.unique()) > 5
    assert (codec.side_pixels, codec.grid, codec.codebook_size) == (20, 4, 40)


def test_other_networks_are_refused(tmp_path: Path, published_network: PublishedTATok) -> None:
    state = {name: tensor.clone() for name, tensor in published_network.state_dict().items()}
    file = tmp_path / "model.safetensors"
    patches, code_bias = "encoder.embeddings.patch_embedding.weight", "bottleneck.in_linear.bias"
    cases = [({"a": torch.zeros(1)}, f"lacks {re.escape(patches)}, so it is not TA-Tok"),
             ({**state, patches: torch.zeros(3)}, r"has the shape \[3\], not 4 axes"),
             ({k: v for k, v in state.items() if k != code_bias}, "lacks to_code.bias"),
             ({**state, "encode_task_layer.0.bias": torch.zeros(9)}, r"has the shape \[9\], not \[32\]"),
             ({**state, "encode_task_layer.0.bias": torch.full((32,), torch.nan)}, "not finite")]
    for tensors, message in cases:
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            import_codec("ta-tok", file, tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


@pytest.mark.each("kind", ["ta-tok", "cosyvoice2"])
def test_pickles_and_damaged_files_are_refused(cwd: Path, kind: str) -> None:
    torch.save({"a": torch.zeros(1)}, "pickled.pth")
    Path("cut.safetensors").write_bytes(b"\x08\0\0\0")
    for name, message in (("pickled.pth", "pass the weights as safetensors"),
                          ("cut.safetensors", "cannot be read"), ("none.pth", "does not exist")):
        with pytest.raises(UserError, match=message):
            import_codec(kind, Path(name), Path("codec"))
    assert not Path("codec").exists()


def add_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Add a module with these attributes, and the packages above it, to `sys.modules` for a test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


@dataclass
class ModelConfig:
    """Double of `s3tokenizer.model_v2.ModelConfig`."""

    n_mels: int = 128
    n_audio_ctx: int = 1500
    n_audio_state: int = 1280
    n_audio_head: int = 20
    n_audio_layer: int = 6
    n_codebook_size: int = 3**8


class S3TokenizerV2(nn.Module):
    """Double of `s3tokenizer.model_v2.S3TokenizerV2`: its convolutions of stride 2 and its quantizer."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        assert "v2" in name
        width = config.n_audio_state
        self.encoder = nn.Module()
        self.encoder.conv1 = nn.Conv1d(config.n_mels, width, 3, stride=2, padding=1)
        self.encoder.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.encoder.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.n_audio_layer))
        self.quantizer = nn.Module()
        self.quantizer._codebook = nn.Module()
        self.quantizer._codebook.project_down = nn.Linear(width, 8)

    @torch.inference_mode()
    def quantize(self, mel: torch.Tensor, mel_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert int(mel_len) <= 3000
        x = self.encoder.conv2(F.gelu(self.encoder.conv1(mel))).transpose(1, 2)
        h = (self.quantizer._codebook.project_down(x).tanh() * 0.9990000128746033).round() + 1
        return (h * 3 ** torch.arange(8.0)).sum(-1).int(), torch.tensor([x.shape[1]])


def log_mel_spectrogram(audio: torch.Tensor, n_mels: int = 128, padding: int = 0) -> torch.Tensor:
    """Double of `s3tokenizer.utils.log_mel_spectrogram` that returns its shape: [n_mels, samples / 160]."""
    return audio.view(-1, 160)[:, :n_mels].T * 20


def test_cosyvoice2_uses_the_network_of_s3tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = S3TokenizerV2("speech_tokenizer_v2_25hz", ModelConfig(80, 1500, 64, 1, 2))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"s3tokenizer .*`pip install s3tokenizer`"):
        import_codec("cosyvoice2", tmp_path / "weights.safetensors", tmp_path / "codec")
    add_module(monkeypatch, "s3tokenizer.model_v2", ModelConfig=ModelConfig, S3TokenizerV2=S3TokenizerV2)
    add_module(monkeypatch, "s3tokenizer.utils", log_mel_spectrogram=log_mel_spectrogram,
               onnx2torch=lambda path, out, verbose: network.state_dict())
    import_codec("cosyvoice2", tmp_path / "weights.safetensors", tmp_path / "codec")
    codec = open_codec(tmp_path / "codec")
    sound = torch.rand(16_000 * 31, generator=torch.Generator().manual_seed(1)) - 0.5
    ids = codec.encode(sound)
    assert (len(ids), ids.dtype, codec.codebook_size) == (31 * 25, torch.int64, 3**8)
    frames = log_mel_spectrogram(sound[:640 * 7], 80)[None]
    assert torch.equal(codec.encode(sound[:640 * 7]), network.quantize(frames, torch.tensor([28]))[0][0])
    assert [len(codec.encode(sound[:n])) for n in (0, 1, 640, 641)] == [0, 1, 1, 2]
    (tmp_path / "speech_tokenizer_v2.onnx").write_bytes(b"")
    import_codec("cosyvoice2", tmp_path / "speech_tokenizer_v2.onnx", tmp_path / "again")
    assert torch.equal(open_codec(tmp_path / "again").encode(sound[:3000]), codec.encode(sound[:3000]))

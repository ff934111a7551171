"""Encoders of pictures and sounds: shapes of parameters and features, and the scan of the compressor."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import count_encoder_params, encoder_shapes
from megatron_sov.omni.codecs import encoders
from megatron_sov.omni.codecs.encoders import Compressor, MediaEncoder, Mixer, cut_patches, scan, select_scan
from megatron_sov.omni.codecs.ta_tok import UnitSimVQ


def draw_inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """Return random x [2, tokens, 3, 4], dt [2, tokens, 3], a [3], b and c [2, tokens, 5] of a scan: two
    sequences, three heads of size 4, and a state of size 5."""
    torch.manual_seed(tokens)
    return (torch.randn(2, tokens, 3, 4).double(), torch.rand(2, tokens, 3).double(),
            -torch.rand(3).double() * 3, *torch.randn(2, 2, tokens, 5).double())


@pytest.mark.each("tokens", [1, 63, 64, 65, 200])
def test_scan_equals_the_recurrence(tokens: int) -> None:
    x, dt, a, b, c = draw_inputs(tokens)
    state, expected = torch.zeros(2, 3, 4, 5).double(), []
    for t in range(tokens):
        state = (dt[:, t] * a).exp()[..., None, None] * state + (
            (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None])
        expected.append(torch.einsum("nhdk,nk->nhd", state, c[:, t]))
    assert float((scan(x, dt, a, b, c) - torch.stack(expected, 1)).abs().max()) < 1e-12


def test_mixer_equals_transformers_with_norm_before_gate() -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    ours = Mixer(16, 8, 4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=1,
                                      expand=2, chunk_size=8, num_hidden_layers=1), 0)
    theirs.load_state_dict(ours.state_dict())
    norm = ours.norm

    class NormBeforeGate(torch.nn.Module):
        def forward(self, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return norm(states) * torch.nn.functional.silu(gate)

    theirs.norm = NormBeforeGate()
    states = torch.randn(2, 21, 16)
    assert float((ours(states) - theirs.eval()(states)).detach().abs().max()) < 1e-4


def test_compressed_feature_depends_on_its_chunk_and_earlier_chunks() -> None:
    config = AudioEncoderConfig(placeholder_ids=(1,), num_frames=200, compression=25, compressor_size=16,
                                compressor_head_dim=8, compressor_state_size=4)
    torch.manual_seed(0)
    network = Compressor(config, 8).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features = torch.randn(1, 50, 8).double()
    before = network(features).detach()
    changed = {}
    for place in (3, 24, 25, 49):  # two in the first chunk of 25 features, two in the second
        other = features.clone()
        other[0, place] += 1
        changed[place] = ((network(other).detach() - before).abs().amax(-1)[0] > 1e-9).tolist()
    assert before.shape == (1, 2, 8)
    assert changed == {3: [True, True], 24: [True, True], 25: [False, True], 49: [False, True]}
    # an average would ignore the order
    assert float((network(features.flip(1))[:, -1] - before[:, -1]).detach().abs().max()) > 1e-3


def test_installed_kernel_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, int] = {}

    def kernel(x: Any, dt: Any, a: Any, b: Any, c: Any, chunk_size: int) -> Any:
        arguments.update(groups=b.shape[2], chunk_size=chunk_size)
        return scan(x, dt, a, b[:, :, 0], c[:, :, 0])

    modules = {name: ModuleType(name) for name in (
        "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")}
    modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = kernel  # type: ignore[attr-defined]
    assert select_scan(torch.device("cuda")) is scan
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: name == "mamba_ssm")
    assert select_scan(torch.device("cpu")) is scan
    result = select_scan(torch.device("cuda"))(*draw_inputs(70))
    assert result.equal(scan(*draw_inputs(70))) and arguments == {"groups": 1, "chunk_size": 64}


QWEN = VisionEncoderConfig(
    placeholder_ids=(1,), image_size=16, patch_size=2, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=24,
    window_size=8, full_attention_layers=(1,), out_hidden_size=24)
SIGLIP = VisionEncoderConfig(
    kind="siglip", placeholder_ids=(1,), image_size=16, patch_size=4, hidden_size=16, num_layers=2,
    num_heads=2, ffn_dim=24, adapter="mlp")
QWEN_AUDIO = AudioEncoderConfig(
    placeholder_ids=(2,), num_mels=4, num_frames=200, hidden_size=16, num_layers=2, num_heads=2, ffn_dim=24,
    compression=25, compressor_size=32, compressor_head_dim=8, compressor_state_size=4)
WHISPER = AudioEncoderConfig(
    kind="whisper", placeholder_ids=(2,), num_mels=4, num_frames=40, hidden_size=16, num_layers=1,
    num_heads=2, ffn_dim=24, adapter="linear")
PUBLISHED = (VisionEncoderConfig(placeholder_ids=(1,)),
             AudioEncoderConfig(placeholder_ids=(2,), compression=25))


def build_model_config(*encoders: Any, hidden_size: int = 32) -> ModelConfig:
    """Return the config of a small Llama model with these encoder configs."""
    fields: dict[str, Any] = {"vision" if isinstance(e, VisionEncoderConfig) else "audio": e
                              for e in encoders}
    return ModelConfig("llama", 64, hidden_size, 2, 4, 4, 8, num_experts=0, dense_ffn_dim=64, **fields)


def draw_records(config: Any, count: int) -> torch.Tensor:
    """Return `count` random pictures (uint8) or spectrograms (float16) for an encoder with `config`."""
    random = np.random.default_rng(3)
    if isinstance(config, VisionEncoderConfig):
        return torch.from_numpy(random.integers(0, 256, (count, *config.record_shape), dtype=np.uint8))
    return torch.from_numpy(random.normal(size=(count, *config.record_shape)).astype(np.float16))


@pytest.mark.each(("encoders", "hidden_size"), [
    ((QWEN, QWEN_AUDIO), 32), ((SIGLIP, WHISPER), 32), (PUBLISHED, 4096)])
def test_parameter_shapes_follow_from_the_config(encoders: tuple[Any, ...], hidden_size: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        for name, config in zip(("vision", "audio"), encoders, strict=True):
            network = MediaEncoder(config, hidden_size)
            shapes |= {f"{name}.{key}": tuple(p.shape) for key, p in network.named_parameters()}
    config = build_model_config(*encoders, hidden_size=hidden_size)
    assert list(shapes.items()) == list(encoder_shapes(config).items())
    assert count_encoder_params(config) == sum(int(np.prod(shape)) for shape in shapes.values())


def test_published_encoders_have_the_published_number_of_features() -> None:
    vision, audio = PUBLISHED
    assert vision.slots == 14 * 14 and audio.slots == 30
    assert not vision.problems(10) and not audio.problems(10)


@pytest.mark.each("config", [QWEN, SIGLIP, QWEN_AUDIO, WHISPER])
def test_features_do_not_depend_on_the_batch(config: Any) -> None:
    torch.manual_seed(1)
    network = MediaEncoder(config, 32).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    raw = draw_records(config, 3)
    together = network(raw)
    assert together.shape == (3, config.slots, 32)
    alone = torch.cat([network(record[None]) for record in raw])
    assert float((together - alone).detach().abs().max()) < 1e-12
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-3


def test_patches_equal_the_transformers_processor() -> None:
    pytest.importorskip("PIL")  # transformers' processor needs it
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=2, merge_size=2, temporal_patch_size=2, do_resize=False, image_mean=list(QWEN.mean),
        image_std=list(QWEN.std))
    raw = draw_records(QWEN, 2)
    theirs = processor(images=[picture.numpy() for picture in raw], input_data_format="channels_first",
                       return_tensors="pt")
    mean, std = (torch.tensor(x)[:, None, None] for x in (QWEN.mean, QWEN.std))
    ours = cut_patches((raw / 255 - mean) / std, QWEN)
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert float((ours - theirs["pixel_values"]).abs().max()) < 1e-5


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    network = MediaEncoder(SIGLIP, 32)
    network.encoder.requires_grad_(False)
    network.train()
    assert not network.encoder.training and network.adapter.training
    features = network(draw_records(SIGLIP, 1))
    features.sum().backward()
    assert network.adapter.fc2.weight.grad is not None
    assert all(p.grad is None for p in network.encoder.parameters())


def test_nearest_code_has_the_largest_cosine() -> None:
    torch.manual_seed(0)
    quantiser, vectors = UnitSimVQ(8, 50), torch.randn(3, 7, 8)
    layer = quantiser.book.code_transform[0]
    codes = quantiser.book.frozen_codebook @ layer.weight.T + layer.bias
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).T
    assert torch.equal(quantiser.find_nearest(vectors), cosines.argmax(-1))


def test_large_codebooks_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser, vectors = UnitSimVQ(4, 30), torch.randn(5, 6, 4)
    expected = quantiser.find_nearest(vectors)
    # 5 x 6 vectors have 30 distances each to 30 codes; a part has at most 70, so two vectors
    monkeypatch.setattr("megatron_sov.omni.codecs.ta_tok._MAX_DISTANCES", 70)
    assert torch.equal(quantiser.find_nearest(vectors), expected)

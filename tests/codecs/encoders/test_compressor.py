"""The compressor's scan and mixer against transformers' Mamba-2 and against the recurrence itself."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_sov.codecs.encoders import compressor
from megatron_sov.codecs.encoders.compressor import Compressor, Mixer, fastest, scan
from megatron_sov.config import AudioEncoderConfig


def drawn(tokens: int) -> tuple[torch.Tensor, ...]:
    """Return x, dt, a, b, c for two sequences."""
    torch.manual_seed(tokens)
    return (torch.randn(2, tokens, 3, 4).double(), torch.rand(2, tokens, 3).double(),
            -torch.rand(3).double() * 3, *torch.randn(2, 2, tokens, 5).double())


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_the_scan_is_the_recurrence(tokens: int) -> None:
    x, dt, a, b, c = drawn(tokens)
    state, expected = torch.zeros(2, 3, 4, 5).double(), []
    for t in range(tokens):
        state = (dt[:, t] * a).exp()[..., None, None] * state + (
            (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None])
        expected.append(torch.einsum("nhdk,nk->nhd", state, c[:, t]))
    assert float((scan(x, dt, a, b, c) - torch.stack(expected, 1)).abs().max()) < 1e-12


def test_a_mixer_is_transformers_mixer_but_for_the_order_of_norm_and_gate() -> None:
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

    class Before(torch.nn.Module):
        def forward(self, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return norm(states) * torch.nn.functional.silu(gate)

    theirs.norm = Before()
    states = torch.randn(2, 21, 16)
    assert float((ours(states) - theirs.eval()(states)).detach().abs().max()) < 1e-4


def test_a_chunk_is_written_at_its_query_and_knows_what_came_before() -> None:
    config = AudioEncoderConfig(placeholder_ids=(1,), num_frames=200, compression=25, compressor_size=16,
                                compressor_head_dim=8, compressor_state_size=4)
    torch.manual_seed(0)
    network = Compressor(config, 8).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features = torch.randn(1, 50, 8).double()
    before = network(features).detach()
    changed = {}
    for place in (3, 24, 25, 49):
        other = features.clone()
        other[0, place] += 1
        changed[place] = (network(other).detach() - before).abs().amax(-1)[0] > 1e-9
    assert before.shape == (1, 2, 8)
    assert [changed[place].tolist() for place in (3, 24)] == [[True, True]] * 2
    assert [changed[place].tolist() for place in (25, 49)] == [[False, True]] * 2
    # an average would not know their order
    assert float((network(features.flip(1))[:, -1] - before[:, -1]).detach().abs().max()) > 1e-3


def test_the_kernel_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of `mamba_ssm`, whose kernel is asked as that package's is."""
    asked: dict[str, int] = {}

    def kernel(x: Any, dt: Any, a: Any, b: Any, c: Any, chunk_size: int) -> Any:
        asked.update(groups=b.shape[2], chunk_size=chunk_size)
        return scan(x, dt, a, b[:, :, 0], c[:, :, 0])

    modules = {name: ModuleType(name) for name in (
        "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")}
    modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = kernel  # type: ignore[attr-defined]
    assert fastest(torch.device("cuda")) is scan
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compressor.importlib.util, "find_spec", lambda name: name == "mamba_ssm")
    assert fastest(torch.device("cpu")) is scan
    found = fastest(torch.device("cuda"))(*drawn(70))
    assert found.equal(scan(*drawn(70))) and asked == {"groups": 1, "chunk_size": 64}

"""Linear attention of a layer against transformers' modules, and cached spans against one pass."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.engine.model.attention import SharedPrompts, pack_documents
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan, pack_spans
from megatron_sov.engine.model.linear_attention import LinearAttention, RecurrentCache
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import LinearAttentionConfig
from megatron_sov.plan.footprint.activations import Tokens, _estimate_linear_attention

OF_KIMI = LinearAttentionConfig(3, 3, 8, 8, 8)
OF_SOLAR = replace(OF_KIMI, negative_eigenvalues=True)
HIDDEN, TOKENS = 24, 150


class Plain(torch.nn.Linear):
    """A projection of a single process."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


@pytest.fixture(params=[OF_KIMI, OF_SOLAR], ids=["Kimi", "Solar Open 2"])
def layer(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> LinearAttention:
    """A float64 layer of one process with random weights."""
    monkeypatch.setattr(context, "get_cp_size", lambda: 1)
    return build_attention(request.param)


def build_attention(sizes: LinearAttentionConfig) -> LinearAttention:
    config = SimpleNamespace(hidden_size=HIDDEN, init_method=None, output_layer_init_method=None,
                             params_dtype=torch.float32, layernorm_epsilon=1e-6, sequence_parallel=False,
                             delta_kernels=False)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    linear_attention = LinearAttention(config, 1, (Plain, Plain, Plain), sizes, SimpleNamespace(tp=alone))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in linear_attention.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.4 - (1.5 if "A_log" in name else 0)
    return linear_attention.double()


def states(tokens: int = TOKENS) -> torch.Tensor:
    """[tokens, 1, hidden]."""
    return torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def row(bounds: list[int]) -> Any:
    return pack_documents(torch.tensor(bounds, dtype=torch.int32), max(bounds), bounds[-1],
                          host_bounds=bounds)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "get_cp_size", lambda: 1)


def split_by_kind(rows: torch.Tensor, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """Split rows ordered by three heads into one tensor per kind."""
    return [part.flatten(0, 1) for part in rows.unflatten(0, (3, -1)).split(widths, 1)]


def test_kimis_layer_and_its_gradients_are_transformers_module(one_process: None) -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    theirs = KimiLinearDeltaAttention(KimiLinearConfig(
        hidden_size=HIDDEN, num_hidden_layers=4, linear_num_heads=3, linear_head_dim=8, rms_norm_eps=1e-6), 0)
    ours = build_attention(OF_KIMI).float()
    q, k, v, b = split_by_kind(ours.in_proj.weight.data, OF_KIMI.projected)
    taps = split_by_kind(ours.conv1d.weight.data, OF_KIMI.projected[:3])
    decay_down, gate_down = ours.gates_down_proj.weight.data.chunk(2)
    theirs.load_state_dict({
        "q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "b_proj.weight": b,
        "conv1d.weight": torch.cat(taps),
        "forget_gate.A_log": ours.A_log.data[None, None, :, None], "forget_gate.dt_bias": ours.dt_bias.data,
        "forget_gate.f_a_proj.weight": decay_down, "g_a_proj.weight": gate_down,
        "forget_gate.f_b_proj.weight": ours.decay_up_proj.weight.data,
        "g_b_proj.weight": ours.output_up_proj.weight.data, "o_norm.weight": ours.out_norm.weight.data,
        "o_proj.weight": ours.out_proj.weight.data})
    x, weights = states().float(), torch.linspace(-1, 1, HIDDEN)
    result = ours(x, packed_seq_params=row([0, TOKENS]))[0][:, 0]
    expected = theirs(x.transpose(0, 1))[0]
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    gate = theirs.forget_gate
    for mine, other in ((ours.A_log, gate.A_log.flatten()), (ours.dt_bias, gate.dt_bias),
                        (ours.decay_up_proj.weight, gate.f_b_proj.weight),
                        (ours.output_up_proj.weight, theirs.g_b_proj.weight),
                        (ours.out_norm.weight, theirs.o_norm.weight),
                        (ours.out_proj.weight, theirs.o_proj.weight)):
        of_theirs = gate.A_log.grad.flatten() if other.shape == ours.A_log.shape else other.grad
        torch.testing.assert_close(mine.grad, of_theirs, atol=1e-4, rtol=2e-4)
    torch.testing.assert_close(ours.gates_down_proj.weight.grad, torch.cat(
        [gate.f_a_proj.weight.grad, theirs.g_a_proj.weight.grad]), atol=2e-4, rtol=2e-4)


def test_packed_documents_equal_separate_documents(layer: LinearAttention) -> None:
    x, bounds = states(), [0, 70, 71, 71, 150]
    together = layer(x, packed_seq_params=row(bounds))[0]
    for start, stop in ((0, 70), (70, 71), (71, 150)):
        alone = layer(x[start:stop], packed_seq_params=row([0, stop - start]))[0]
        torch.testing.assert_close(together[start:stop], alone, atol=1e-13, rtol=1e-12)


def test_saved_tensors_equal_the_bytes_that_plan_counts(layer: LinearAttention) -> None:
    tokens, weights = 512, {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(states(tokens), packed_seq_params=row([0, tokens]))
    result = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    counted = _estimate_linear_attention(layer.sizes, "fp64", Tokens(tokens, tokens, tokens), tp=1)
    # the norm saves the layer's input; positions and masks, a few numbers per token, are not counted
    assert 0 <= result - sum(counted.values()) - tokens * HIDDEN * 8 <= tokens * 6 * 8


def test_responses_with_a_shared_prompt_equal_whole_documents(layer: LinearAttention) -> None:
    """A prompt of 70 tokens, stored once, with responses of 3 and 5."""
    x = states(78)
    source = torch.cat([torch.arange(73), torch.arange(70), torch.arange(73, 78)])
    shared = SharedPrompts(source, [(0, 0, 73), (73, 143, 148)], torch.zeros(148, dtype=torch.bool))
    bounds = torch.tensor([0, 73, 148], dtype=torch.int32)
    result = layer(x, packed_seq_params=pack_documents(bounds, 75, 148, shared=shared))[0]
    whole = layer(x[source], packed_seq_params=row([0, 73, 148]))[0]
    torch.testing.assert_close(result, torch.cat([whole[:73], whole[143:]]), atol=1e-13, rtol=1e-12)


def read(layer: LinearAttention, x: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """Read spans (slot, past, end) of sequences with hidden states x; return their outputs."""
    tokens = [CacheSpan(slot, past, [0] * (end - past)) for slot, past, end in spans]
    packed = pack_spans(tokens, sum(end - past for _, past, end in spans) + 2, torch.device("cpu")).packed
    inputs = torch.cat([*(x[past:end] for _, past, end in spans), x[:2]])  # two padding tokens
    return layer(inputs, packed_seq_params=packed)[0][:-2]


@torch.no_grad()
def test_cached_spans_and_single_tokens_equal_one_pass(layer: LinearAttention) -> None:
    x = states()
    expected = layer(x, packed_seq_params=row([0, TOKENS]))[0]
    layer.state_cache = cache = RecurrentCache(CacheSize(3, TOKENS), layer)
    close = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(read(layer, x, [(0, 0, 5), (1, 0, 80)]),
                               torch.cat([expected[:5], expected[:80]]), **close)
    cache.copy(1, [2])
    sizes = [t.shape for t in (cache._state, cache._inputs)]
    past = {0: 5, 1: 80, 2: 80}
    while max(past.values()) + 2 < TOKENS:
        spans = [(slot, at, at + 1) for slot, at in past.items()]
        torch.testing.assert_close(read(layer, x, spans), torch.cat([expected[a:b] for _, a, b in spans]),
                                   **close)
        past = {slot: end for slot, _, end in spans}
    long = [(1, past[1], TOKENS)]  # several tokens after single ones
    torch.testing.assert_close(read(layer, x, long), expected[past[1]:], **close)
    assert sizes == [t.shape for t in (cache._state, cache._inputs)]
    torch.testing.assert_close(read(layer, x, [(1, 0, 9)]), expected[:9], **close)  # a new sequence starts
    with pytest.raises(RuntimeError, match=r"resume at \[1\]"):
        read(layer, x, [(1, 1, 2)])

"""A linear attention layer against transformers' module, and cached reading of spans against one pass."""

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

KIMI_SIZES = LinearAttentionConfig(3, 3, 8, 8, 8)
SOLAR_SIZES = replace(KIMI_SIZES, negative_eigenvalues=True)
HIDDEN, TOKENS = 24, 150


class LocalLinear(torch.nn.Linear):
    """A projection of a single process."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


@pytest.fixture(params=[KIMI_SIZES, SOLAR_SIZES], ids=["Kimi", "Solar Open 2"])
def layer(one_process: None, request: pytest.FixtureRequest) -> LinearAttention:
    """A float64 layer of one process with random weights."""
    return build_attention(request.param)


def build_attention(sizes: LinearAttentionConfig) -> LinearAttention:
    config = SimpleNamespace(hidden_size=HIDDEN, init_method=None, output_layer_init_method=None,
                             params_dtype=torch.float32, layernorm_epsilon=1e-6, sequence_parallel=False,
                             delta_kernels=False)
    one_process_group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    linear_attention = LinearAttention(config, 1, (LocalLinear, LocalLinear, LocalLinear), sizes,
                                       SimpleNamespace(tp=one_process_group))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in linear_attention.named_parameters():
        mean = -1.5 if "A_log" in name else 0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4 + mean
    return linear_attention.double()


def draw_states(tokens: int = TOKENS) -> torch.Tensor:
    """Return random hidden states [tokens, 1, hidden]."""
    return torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pack_row(bounds: list[int]) -> Any:
    return pack_documents(torch.tensor(bounds, dtype=torch.int32), max(bounds), bounds[-1],
                          host_bounds=bounds)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "get_cp_size", lambda: 1)


def split_by_kind(rows: torch.Tensor, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """Split the rows of a fused weight, ordered by head (3) and kind, into one tensor per kind."""
    return [rows_of_kind.flatten(0, 1) for rows_of_kind in rows.unflatten(0, (3, -1)).split(widths, 1)]


def test_kimis_layer_and_its_gradients_are_transformers_module(one_process: None) -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    reference = KimiLinearDeltaAttention(KimiLinearConfig(
        hidden_size=HIDDEN, num_hidden_layers=4, linear_num_heads=3, linear_head_dim=8, rms_norm_eps=1e-6), 0)
    ours = build_attention(KIMI_SIZES).float()
    q, k, v, b = split_by_kind(ours.in_proj.weight.data, KIMI_SIZES.projected)
    taps = split_by_kind(ours.conv1d.weight.data, KIMI_SIZES.projected[:3])
    decay_down, gate_down = ours.gates_down_proj.weight.data.chunk(2)
    reference.load_state_dict({
        "q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "b_proj.weight": b,
        "conv1d.weight": torch.cat(taps),
        "forget_gate.A_log": ours.A_log.data[None, None, :, None], "forget_gate.dt_bias": ours.dt_bias.data,
        "forget_gate.f_a_proj.weight": decay_down, "g_a_proj.weight": gate_down,
        "forget_gate.f_b_proj.weight": ours.decay_up_proj.weight.data,
        "g_b_proj.weight": ours.output_up_proj.weight.data, "o_norm.weight": ours.out_norm.weight.data,
        "o_proj.weight": ours.out_proj.weight.data})
    x, weights = draw_states().float(), torch.linspace(-1, 1, HIDDEN)
    result = ours(x, packed_seq_params=pack_row([0, TOKENS]))[0][:, 0]
    expected = reference(x.transpose(0, 1))[0]
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    gate = reference.forget_gate
    for parameter, reference_parameter in (
            (ours.dt_bias, gate.dt_bias), (ours.decay_up_proj.weight, gate.f_b_proj.weight),
            (ours.output_up_proj.weight, reference.g_b_proj.weight),
            (ours.out_norm.weight, reference.o_norm.weight), (ours.out_proj.weight, reference.o_proj.weight)):
        torch.testing.assert_close(parameter.grad, reference_parameter.grad, atol=1e-4, rtol=2e-4)
    torch.testing.assert_close(ours.A_log.grad, gate.A_log.grad.flatten(), atol=1e-4, rtol=2e-4)
    torch.testing.assert_close(ours.gates_down_proj.weight.grad, torch.cat(
        [gate.f_a_proj.weight.grad, reference.g_a_proj.weight.grad]), atol=2e-4, rtol=2e-4)


def test_packed_documents_equal_separate_documents(layer: LinearAttention) -> None:
    x, bounds = draw_states(), [0, 70, 71, 71, 150]
    together = layer(x, packed_seq_params=pack_row(bounds))[0]
    for start, stop in ((0, 70), (70, 71), (71, 150)):
        separate = layer(x[start:stop], packed_seq_params=pack_row([0, stop - start]))[0]
        torch.testing.assert_close(together[start:stop], separate, atol=1e-13, rtol=1e-12)


def test_saved_tensors_equal_the_bytes_that_plan_counts(layer: LinearAttention) -> None:
    tokens, weights = 512, {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save_tensor(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor):
        layer(draw_states(tokens), packed_seq_params=pack_row([0, tokens]))
    saved_bytes = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in weights)
    estimate = _estimate_linear_attention(layer.sizes, "fp64", Tokens(tokens, tokens, tokens), tp=1)
    # `plan` counts the layer's input with the norm, and no positions and masks: up to 6 numbers per token
    input_bytes = tokens * HIDDEN * 8
    assert 0 <= saved_bytes - sum(estimate.values()) - input_bytes <= tokens * 6 * 8


def test_responses_with_a_shared_prompt_equal_whole_documents(layer: LinearAttention) -> None:
    """A prompt of 70 tokens, stored once, with responses of 3 and 5: 78 tokens for documents of 73 and 75."""
    x = draw_states(78)
    source = torch.cat([torch.arange(73), torch.arange(70), torch.arange(73, 78)])
    shared = SharedPrompts(source, [(0, 0, 73), (73, 143, 148)], torch.zeros(148, dtype=torch.bool))
    bounds = torch.tensor([0, 73, 148], dtype=torch.int32)
    result = layer(x, packed_seq_params=pack_documents(bounds, 75, 148, shared=shared))[0]
    expected = layer(x[source], packed_seq_params=pack_row([0, 73, 148]))[0]
    torch.testing.assert_close(result, torch.cat([expected[:73], expected[143:]]), atol=1e-13, rtol=1e-12)


def read_spans(layer: LinearAttention, x: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """Run the layer on spans of the sequence x and return their outputs.

    A span is (slot of the cache, tokens read before, end): the layer reads tokens past..end of x.
    """
    tokens = [CacheSpan(slot, past, [0] * (end - past)) for slot, past, end in spans]
    packed = pack_spans(tokens, sum(end - past for _, past, end in spans) + 2, torch.device("cpu")).packed
    inputs = torch.cat([*(x[past:end] for _, past, end in spans), x[:2]])  # two padding tokens
    return layer(inputs, packed_seq_params=packed)[0][:-2]


@torch.no_grad()
def test_cached_spans_and_single_tokens_equal_one_pass(layer: LinearAttention) -> None:
    x = draw_states()
    expected = layer(x, packed_seq_params=pack_row([0, TOKENS]))[0]
    layer.state_cache = cache = RecurrentCache(CacheSize(3, TOKENS), layer)
    tolerance = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(read_spans(layer, x, [(0, 0, 5), (1, 0, 80)]),
                               torch.cat([expected[:5], expected[:80]]), **tolerance)
    cache.copy(1, [2])
    sizes = [t.shape for t in (cache._state, cache._inputs)]
    past = {0: 5, 1: 80, 2: 80}
    while max(past.values()) + 2 < TOKENS:
        spans = [(slot, position, position + 1) for slot, position in past.items()]
        expected_outputs = torch.cat([expected[begin:end] for _, begin, end in spans])
        torch.testing.assert_close(read_spans(layer, x, spans), expected_outputs, **tolerance)
        past = {slot: end for slot, _, end in spans}
    last_span = [(1, past[1], TOKENS)]  # several tokens at once, after single tokens
    torch.testing.assert_close(read_spans(layer, x, last_span), expected[past[1]:], **tolerance)
    assert sizes == [t.shape for t in (cache._state, cache._inputs)]
    # A span that begins at token 0 starts a new sequence in its slot.
    torch.testing.assert_close(read_spans(layer, x, [(1, 0, 9)]), expected[:9], **tolerance)
    with pytest.raises(RuntimeError, match=r"resume at \[1\]"):
        read_spans(layer, x, [(1, 1, 2)])

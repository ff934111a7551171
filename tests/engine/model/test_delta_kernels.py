"""Calls of flash-linear-attention's kernel; the package's plain torch function replaces the kernel."""

import __future__

import ast
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.engine.model import delta_rule
from megatron_sov.engine.model.delta_rule import apply_delta_rule, chunk_documents
from megatron_sov.engine.parallel.gpu_libraries import FLA_KERNEL
from tests import releases
from tests.engine.model.test_delta_rule import HEADS, VALUES, R, draw_inputs

DOCUMENTS = [(0, 0, 70), (70, 100, 171), (171, 171, 172), (172, 172, 200)]
"""(start, first output token, end)."""
TOKENS = DOCUMENTS[-1][2]


@pytest.fixture(scope="module")
def fla() -> Path:
    """Folder with the kernels' sources, which import only on GPUs."""
    return releases.fetch_wheel("fla-core", "0.6.0") / "fla/ops"


def load_signature(file: Path, function: str) -> Callable[..., dict[str, Any]]:
    """Return a function with the signature of `function` in `file` that returns its arguments by name.

    The file itself imports only on GPUs.
    """
    [node] = [n for n in ast.parse(file.read_text()).body
              if isinstance(n, ast.FunctionDef) and n.name == function]
    node.body, node.decorator_list = ast.parse("def f():\n  return locals()").body[0].body, []
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module([node], []), str(file), "exec", __future__.annotations.compiler_flag), namespace)
    return namespace[function]


def load_plain_function(file: Path, function: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return a plain torch version from the kernels' package."""
    spec = importlib.util.spec_from_file_location(f"{function}_module", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


@pytest.fixture
def plain_kernel(fla: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernel by the plain version, document by document."""
    module, name = FLA_KERNEL
    folder = fla / module.rpartition(".")[2]
    signature = load_signature(folder / "chunk.py", name)
    rule = load_plain_function(folder / "naive.py", f"naive_recurrent_{folder.name}")

    def apply_plain_rule(*values: Any, **options: Any) -> tuple[torch.Tensor, None]:
        arguments = signature(*values, **options)
        q, k, v, g, beta, bounds = (arguments[n] for n in ("q", "k", "v", "g", "beta", "cu_seqlens"))
        assert arguments["kwargs"] == {} and bounds.dtype == torch.int64
        assert g.dtype == beta.dtype == torch.float32
        assert (len(q), q.shape, g.shape[:3]) == (1, k.shape, v.shape[:3]) and beta.shape == v.shape[:3]
        assert torch.equal(bounds, arguments["cu_seqlens_cpu"])
        q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
        return torch.cat([rule(q=q[:, a:b], k=k[:, a:b], v=v[:, a:b], g=g[:, a:b], beta=beta[:, a:b],
                               scale=arguments["scale"])[0]
                          for a, b in itertools.pairwise(bounds)], 1), None

    monkeypatch.setattr(delta_rule, "_load_fla_kernel", lambda: apply_plain_rule)


@pytest.mark.usefixtures("plain_kernel")
def test_outputs_and_gradients_equal_plain_torch() -> None:
    rows = [draw_inputs(TOKENS, torch.float32) for _ in range(2)]
    chunks = chunk_documents(DOCUMENTS, torch.device("cpu"))
    result = delta_rule.apply_fused_delta_rule(*rows[0], chunks=chunks, dtype=torch.float32)
    expected, _ = apply_delta_rule(*rows[1], chunks=chunks)

    assert result.shape == (TOKENS - 30, HEADS, R, VALUES)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-5)
    for outputs in (result, expected):
        (outputs * torch.linspace(-1, 1, VALUES)).sum().backward()
    for tensor, expected_tensor in zip(*rows, strict=True):
        torch.testing.assert_close(tensor.grad, expected_tensor.grad, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("plain_kernel")
def test_products_are_in_the_models_precision_and_decays_and_rates_are_not() -> None:
    row = [t.detach() for t in draw_inputs(TOKENS, torch.float32)]
    chunks = chunk_documents(DOCUMENTS, torch.device("cpu"))
    exact, rounded = (delta_rule.apply_fused_delta_rule(*row, chunks=chunks, dtype=dtype)
                      for dtype in (torch.float32, torch.bfloat16))

    assert rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2

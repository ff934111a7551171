"""Folders of `convert to-megatron --framework bridge`, loaded and exported by Megatron-Bridge's own code.

    python benchmarks/megatron_bridge.py PACKAGES > benchmarks/results/megatron_bridge.txt

PACKAGES: a folder with megatron-bridge 0.6.2, transformers 5.12.1, tokenizers 0.22.2, nvidia-modelopt 0.47.0,
huggingface-hub 1.33.0, pulp, omegaconf, hydra-core and antlr4-python3-runtime 4.9.3, by
`pip install --no-deps --ignore-requires-python --target PACKAGES ...`. Transformer Engine is the tests'
double, and three packages that no conversion uses are stubs.
"""

import contextlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import tempfile
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STUBBED = ("mlflow", "comet_ml", "megatron.energon")
CONFIGS = ("Qwen/Qwen2-0.5B", "Qwen/Qwen3-4B", "Qwen/Qwen3-235B-A22B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
           "LGAI-EXAONE/K-EXAONE-236B-A23B, four layers of TensorRT-LLM's test")
SOLAR_OPEN: dict[str, Any] = {
    "model_type": "solar_open", "architectures": ["SolarOpenForCausalLM"], "vocab_size": 96,
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 131072, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-5, "attention_bias": False,
    "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.15, "pad_token_id": None}
ROPES: dict[str, dict[str, Any]] = {
    "Solar Open": {"rope_type": "default", "rope_theta": 1e6},
    "Solar Open with YaRN": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0,
                             "original_max_position_embeddings": 65536}}


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules in `STUBBED` as modules whose names are empty classes."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in STUBBED or fullname.startswith(tuple(f"{name}." for name in STUBBED)):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module: Any = types.ModuleType(spec.name)
        subscript = {"__class_getitem__": classmethod(lambda cls, item: cls)}
        module.__getattr__ = lambda name: type(name, (), subscript)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_bridge(packages: Path) -> None:
    """Import Megatron-Bridge, which is written for Python 3.12 and GPUs."""
    typing.override = lambda function: function  # type: ignore[attr-defined, assignment]
    sys.path[:0] = [str(packages), str(ROOT), str(ROOT / "tests/te_double"), str(ROOT / "examples/bridge")]
    sys.meta_path.append(Stubs())
    logging.disable(logging.WARNING)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import transformer_engine.pytorch  # noqa: F401  before the engine, which else hides it

    import megatron_sov.engine  # noqa: F401  prepares megatron-core without GPU
    fusions: Any = types.ModuleType("megatron.bridge.utils.fusions")
    source = packages / "megatron/bridge/utils/fusions.py"
    exec(compile(source.read_text(), str(source), "exec"), vars(fusions))
    fusions.can_enable_gradient_accumulation_fusion = lambda: False
    sys.modules[fusions.__name__] = fusions
    import solar_open  # noqa: F401  registers the bridge of examples/bridge


def save_model(config: dict[str, Any], folder: Path) -> None:
    """Save a random model, with random selection biases, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from tests.convert.test_hub_configs import save_random_model
    save_random_model(config, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(90)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def compare_with_bridge(config: dict[str, Any], folder: Path) -> str:
    """Return the outcome of Bridge's load, forward pass and export, of our folder and of its own import."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import (
        load_megatron_model, load_tokenizer, temporary_distributed_context)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from transformers import AutoModelForCausalLM

    from megatron_sov import convert
    from megatron_sov.convert.megatron.to_megatron import to_megatron

    save_model(config, folder / "hf")
    convert.from_hf(folder / "hf", folder / "checkpoint", "float32")
    convert.to_hf(folder / "checkpoint", folder / "ours")
    to_megatron(folder / "checkpoint", folder / "out", framework="bridge")
    iteration, ids = folder / "out/iter_0000000", torch.randint(2, 90, (1, 20))
    reference = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    ours, outcomes = read_tensors(folder / "ours"), []
    with temporary_distributed_context("gloo"), torch.no_grad():
        logits = reference(ids).logits
        model_parallel_cuda_manual_seed(0)
        bridge = AutoBridge.from_hf_pretrained(str(folder / "hf"))
        provider = bridge.to_megatron_provider(load_weights=True)
        provider.finalize()
        imported = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        loaded = load_megatron_model(str(iteration), use_cpu_init=True)
        for name, model in (("our folder", loaded), ("its import", imported)):
            found = model[0].eval()(ids, torch.arange(20)[None], None)[..., :logits.shape[-1]]
            difference = float((found - logits).abs().max() / logits.abs().max())
            bridge.save_hf_pretrained(model, str(folder / name), show_progress=False)
            theirs = read_tensors(folder / name)
            equal = sum(key in theirs and torch.equal(theirs[key], ours[key]) for key in ours)
            outcomes.append(f"{name}: logits {difference:.1e}, {equal} of {len(ours)} tensors equal")
    load_tokenizer(str(iteration))
    return "; ".join(outcomes)


def main() -> None:
    packages = Path(sys.argv[1]).resolve()
    import_bridge(packages)
    import torch
    from measurement import describe_machine

    from tests.convert.test_hub_configs import PUBLISHED_CONFIGS, shrink_config
    print(f"{describe_machine()}, torch {torch.__version__}, " + ", ".join(
        f"{name} {version(name)}" for name in ("megatron-core", "megatron-bridge", "transformers")) + "\n")
    cases = {name: shrink_config(PUBLISHED_CONFIGS[name]) for name in CONFIGS} | {
        name: SOLAR_OPEN | {"rope_parameters": rope} for name, rope in ROPES.items()}
    for name, config in cases.items():
        # Bridge prints its progress
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            outcome = compare_with_bridge(config | {"dtype": "float32", "torch_dtype": "float32"},
                                          Path(folder))
        print(f"{name} | {outcome}", flush=True)
    print("\nlogits: largest difference from transformers in float32, as a share of the largest logit; "
          "tensors: exported by\nMegatron-Bridge and by `convert to-hf`, compared bit by bit; its import: "
          "AutoBridge.from_hf_pretrained, and for Solar Open\nexamples/bridge/solar_open.py.")


if __name__ == "__main__":
    main()

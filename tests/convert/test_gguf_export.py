"""GGUF files: read back by llama.cpp's own library, and run by transformers, which reads them too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, Exaone4Config, Exaone4ForCausalLM, ExaoneMoeConfig,
    ExaoneMoeForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig,
    MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
    Qwen3MoeForCausalLM, SolarOpenConfig, SolarOpenForCausalLM)

from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.convert.gguf_export import SPLITS, read_tokenizer, rope_divisors, to_gguf
from megatron_sov.model.config.model import Llama3RopeConfig
from megatron_sov.model.families.supported import QWEN2_SPLIT

VOCAB, NUM_TOKENS = 320, 300
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
THETA = {"rope_type": "default", "rope_theta": 50_000.0}
TEMPLATE = ("{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")
TEXT = "Ein Satz, 1234 Zahlen; 한국어와 déjà vu!\n\n  It's <|stop|> 🙂"


def llama(folder: Path) -> Path:
    return save(LlamaForCausalLM(LlamaConfig(rope_parameters=THETA, head_dim=32, **SIZES)), folder)


def qwen2(folder: Path) -> Path:
    """Biases, and a head that is the embedding."""
    model = Qwen2ForCausalLM(Qwen2Config(rope_parameters=THETA, tie_word_embeddings=True, **SIZES))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    return save(model, folder)


def qwen3(folder: Path) -> Path:
    """transformers takes heads of 128 for every GGUF file of this family."""
    return save(Qwen3ForCausalLM(Qwen3Config(rope_parameters=THETA, head_dim=128, **SIZES)), folder)


FAMILIES = {make.__name__: make for make in (llama, qwen2, qwen3)}
"""Those that transformers reads from GGUF, too."""
SLIDES = ["sliding_attention"] * 3 + ["full_attention"]
OTHERS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "sliding_window": None,
                                                    "head_dim": 32}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 32}),
    "exaone4": (Exaone4ForCausalLM, Exaone4Config, {"layer_types": ["full_attention"] * 2,
                                                    "sliding_window": None}),
    "exaone_moe": (ExaoneMoeForCausalLM, ExaoneMoeConfig, {
        "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32,
        "sliding_window": 8, "num_hidden_layers": 4, "layer_types": SLIDES, "n_group": 2, "topk_group": 1}),
    "solar_open": (SolarOpenForCausalLM, SolarOpenConfig, {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_qk_norm": True,
        "attention_bias": True, "first_k_dense_replace": 1})}
"""Those that llama.cpp alone reads: class, config, and what it has beside `SIZES`."""


def other(family: str, folder: Path, **settings) -> Path:
    """Biases are no zeros, and the experts' bias is not rounded."""
    made, config, own = OTHERS[family]
    model = made(config(**SIZES | {"rope_parameters": {**THETA}} | own | settings))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    return save(model, folder)


def save(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.named_parameters():
        if "norm" in name:  # one is what a forgotten norm would be
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, split: str = QWEN2_SPLIT, more: tuple[str, ...] = ()) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT * 3], trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|end|>", "<|start|>", "<|stop|>", *more]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return llama(tmp_path_factory.mktemp("llama"))


NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
         "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.w1": "ffn_gate_exps",
         "block_sparse_moe.experts.w2": "ffn_down_exps", "block_sparse_moe.experts.w3": "ffn_up_exps",
         **{f"mlp.{kind}.{part}_proj": f"ffn_{part}_{theirs}" for part in ("gate", "up", "down")
            for kind, theirs in (("experts", "exps"), ("shared_experts", "shexp"))}}
OTHER_NAMES = {"exaone4": {"post_attention_layernorm": "post_attention_norm",
                           "post_feedforward_layernorm": "post_ffw_norm"},
               "solar_open": {"post_attention_layernorm": "post_attention_norm"},
               "glm4_moe": {"post_attention_layernorm": "post_attention_norm"}}


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's tensors as llama.cpp names and turns them, written down once more by hand."""
    found, names = {}, NAMES | OTHER_NAMES.get(folder.name, {})
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("e_score_correction_bias"):
            found[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = tensor
            continue
        module, kind = name.rsplit(".", 1)
        layer = re.sub(r"experts\.\d+", "experts", module).removeprefix("model.layers.").partition(".")
        theirs = (f"blk.{layer[0]}.{names[layer[2]]}" if module.startswith("model.layers.")
                  else names[module])
        if folder.name.startswith(("llama", "mixtral")) and theirs.endswith(("attn_q", "attn_k")):
            # row 2 i of a head of 32 is row i in Hugging Face's order, row 2 i + 1 is row i + 16
            order = [head + i // 2 + i % 2 * 16 for head in range(0, len(tensor), 32) for i in range(32)]
            tensor = tensor[order]
        found.setdefault(f"{theirs}.{kind}", {})[module] = tensor
    return {name: parts if torch.is_tensor(parts) else torch.stack(
        [parts[key] for key in sorted(parts)]) if name.endswith("exps.weight") else next(iter(parts.values()))
        for name, parts in found.items()}


def stored(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    return {tensor.name: (tensor.tensor_type.name,
                          torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))))
            for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, name: str):
    return gguf.GGUFReader(file).get_field(name).contents()


def test_every_number_is_read_back(folder: Path, tmp_path: Path) -> None:
    """Bit by bit; in q8_0 within half a step of a block, whose scale has the 11 bits of float16."""
    wanted = expected(folder)
    to_gguf(folder, tmp_path / "f32.gguf", "f32")
    found = stored(tmp_path / "f32.gguf")
    assert found.keys() == wanted.keys() and {kind for kind, _ in found.values()} == {"F32"}
    assert all(found[name][1].equal(tensor) for name, tensor in wanted.items())
    to_gguf(folder, tmp_path / "q8_0.gguf", "q8_0")
    for name, (kind, tensor) in stored(tmp_path / "q8_0.gguf").items():
        if wanted[name].ndim == 1:
            assert kind == "F32" and tensor.equal(wanted[name])
            continue
        largest = wanted[name].view(-1, 32).abs().amax(1, keepdim=True)
        allowed = largest / 127 * (0.5 + 127 * 2 ** -11)
        assert kind == "Q8_0" and bool(((tensor - wanted[name]).view(-1, 32).abs() <= allowed).all())
    assert (tmp_path / "q8_0.gguf").stat().st_size < (tmp_path / "f32.gguf").stat().st_size / 2


@pytest.mark.parametrize("family", OTHERS)
def test_experts_become_one_tensor_of_a_layer(family: str, tmp_path: Path) -> None:
    """Of those with experts; in bfloat16 routers and their biases stay in float32."""
    source = other(family, tmp_path / family)
    wanted = expected(source)
    to_gguf(source, tmp_path / "bf16.gguf", "bf16")
    found = stored(tmp_path / "bf16.gguf")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        keeps = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        assert found[name][0] == ("F32" if keeps else "BF16")
        assert found[name][1].equal(tensor if keeps else tensor.bfloat16().float()), name


def test_a_models_experts_and_windows_are_said(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    to_gguf(other("exaone_moe", tmp_path / "exaone_moe"), file)
    said = {"expert_count": 4, "expert_used_count": 2, "expert_shared_count": 1, "expert_group_count": 2,
            "expert_group_used_count": 1, "expert_feed_forward_length": 32, "leading_dense_block_count": 1,
            "expert_shared_feed_forward_length": 32, "expert_weights_scale": 2.5, "feed_forward_length": 96,
            "expert_weights_norm": True, "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
            "attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True, True, False]}
    assert {name: field(file, f"exaone-moe.{name}") for name in said} == said
    to_gguf(other("glm4_moe", tmp_path / "glm4_moe"), file, overwrite=True)
    assert field(file, "glm4moe.rope.dimension_count") == 8  # half of a head
    to_gguf(other("mixtral", tmp_path / "mixtral"), file, overwrite=True)
    assert field(file, "llama.expert_gating_func") == gguf.ExpertGatingFuncType.SOFTMAX
    assert field(file, "llama.feed_forward_length") == 96  # of an expert, since no layer is dense


@torch.no_grad()
def test_transformers_computes_the_same_logits(folder: Path, tmp_path: Path) -> None:
    to_gguf(folder, tmp_path / "model.gguf")
    ids = torch.randint(0, NUM_TOKENS, (2, 48), generator=torch.Generator().manual_seed(1))
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=2e-5)


def test_matrices_keep_their_dtype(tmp_path: Path) -> None:
    """`keep` is the default; norms are float32, whatever the folder has."""
    source = save(LlamaForCausalLM(LlamaConfig(head_dim=32, **SIZES)), tmp_path / "llama", torch.bfloat16)
    assert main(["convert", "to-gguf", str(source), str(tmp_path / "new" / "model.gguf")]) == 0
    found, wanted = stored(tmp_path / "new" / "model.gguf"), expected(source)
    assert {kind for kind, tensor in found.values() if tensor.ndim == 2} == {"BF16"}
    assert {kind for kind, tensor in found.values() if tensor.ndim == 1} == {"F32"}
    assert all(found[name][1].equal(tensor.float()) for name, tensor in wanted.items())
    assert field(tmp_path / "new" / "model.gguf", "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source, file = qwen2(tmp_path / "qwen2"), tmp_path / "model.gguf"
    to_gguf(source, file)
    raw = json.loads((source / "tokenizer.json").read_text())
    tokens, kinds = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    assert [tokens.index(token) for token in raw["model"]["vocab"]] == list(raw["model"]["vocab"].values())
    assert tokens[NUM_TOKENS:] == [f"[PAD{i}]" for i in range(NUM_TOKENS, VOCAB)]
    assert kinds == ([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (NUM_TOKENS - 4)
                     + [gguf.TokenType.UNUSED] * (VOCAB - NUM_TOKENS))
    assert field(file, "tokenizer.ggml.merges") == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert field(file, "tokenizer.ggml.pre") == "qwen2" and field(file, "tokenizer.chat_template") == TEMPLATE
    ids = {name: field(file, f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eos", "eot")}
    # generation ends at the end of a turn too, which the template says
    assert ids == {"padding": 0, "eos": 1, "eot": 3}
    assert field(file, "tokenizer.ggml.add_bos_token") is False
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert theirs(TEXT).input_ids == Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids


def test_an_end_that_llama_cpp_ignores_is_told(llama_dir: Path, tmp_path: Path, capsys) -> None:
    """As in Solar Open, whose `<|end|>` ends a thought."""
    source = copy(llama_dir, tmp_path / "llama")
    read_tokenizer(source, VOCAB)
    assert "stop string" not in capsys.readouterr().err
    write_tokenizer(source, more=("<|flush|>", "<|calls|>"))
    read_tokenizer(source, VOCAB)
    assert "give its programs <|end|> as a stop string" in capsys.readouterr().err


def test_llama_3_scales_its_frequencies(tmp_path: Path) -> None:
    """Beside transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(rope_parameters=scaling, head_dim=32, **SIZES)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** -(torch.arange(0, 32, 2).double() / 32)
    divisors = rope_divisors(Llama3RopeConfig(8.0, 1.0, 4.0, 64), 500_000.0, 32)
    torch.testing.assert_close(plain / divisors, theirs.double(), rtol=1e-6, atol=0)
    assert divisors[0] == 1 and divisors[-1] == 8 and len(divisors.unique()) > 2
    to_gguf(save(LlamaForCausalLM(config), tmp_path / "llama"), tmp_path / "model.gguf")
    assert stored(tmp_path / "model.gguf")["rope_freqs.weight"][1].equal(divisors)


@pytest.mark.parametrize("scaling, said", [
    ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
     {"type": "yarn", "factor": 4.0, "original_context_length": 64})])
def test_other_scalings_are_said(scaling: dict, said: dict, tmp_path: Path) -> None:
    config = Qwen2Config(rope_parameters={"rope_theta": 1e4, **scaling}, **SIZES)
    to_gguf(save(Qwen2ForCausalLM(config), tmp_path / "qwen2"), tmp_path / "model.gguf")
    assert {name: field(tmp_path / "model.gguf", f"qwen2.rope.scaling.{name}") for name in said} == said


@pytest.mark.parametrize("split", SPLITS)
def test_splits_have_llama_cpps_names(split: str, llama_dir: Path, tmp_path: Path) -> None:
    """And with `ignore_merges` another one, or none."""
    source = copy(llama_dir, tmp_path / "llama")
    write_tokenizer(source, split)
    raw = json.loads((source / "tokenizer.json").read_text())
    for ignores in (False, True):
        raw["model"]["ignore_merges"] = ignores
        (source / "tokenizer.json").write_text(json.dumps(raw))
        if ignores in SPLITS[split]:
            to_gguf(source, tmp_path / f"{ignores}.gguf")
            assert field(tmp_path / f"{ignores}.gguf", "tokenizer.ggml.pre") == SPLITS[split][ignores]
        else:
            with pytest.raises(UserError, match="would give other ids"):
                to_gguf(source, tmp_path / f"{ignores}.gguf")


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def changed(file: str, **fields):
    def change(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(value | fields))
    return change


def with_normalizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(folder / "tokenizer.json"))


def with_more_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB - NUM_TOKENS + 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def without_sense(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def too_large(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, type_, said", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "keep", "has no tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "keep", "cannot be read as JSON"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "keep", "cannot be read as a tokenizer"),
    (lambda folder: write_tokenizer(folder, r"\w+"), "keep", "would give other ids"),
    (with_normalizer, "keep", "normalizer NFKC"),
    (changed("tokenizer.json", pre_tokenizer=None), "keep", "no byte-level BPE"),
    (with_more_tokens, "keep", "has the id 320, and the model 320 ids"),
    (changed("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                                             "original_max_position_embeddings": 64, "truncate": False}),
     "keep", "truncate"),
    (without_sense, "keep", "lm_head.weight holds NaN"),
    (too_large, "f16", "does not fit float16.*--type bf16"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "keep", "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "keep", "has neither")])
def test_bad_input_is_told(change, type_: str, said: str, llama_dir: Path, tmp_path: Path) -> None:
    """And leaves nothing."""
    source = copy(llama_dir, tmp_path / "llama")
    change(source)
    with pytest.raises(UserError, match=said):
        to_gguf(source, tmp_path / "out.gguf", type_)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
STEEP = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
         "beta_fast": 16.0}


@pytest.mark.parametrize("family, settings, said", [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = false"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
    ("qwen3_moe", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    ("solar_open", {"rope_parameters": STEEP}, "beta_fast = 16, beta_slow = 1"),
    ("exaone4", {"head_dim": 32}, "num_attention_heads x head_dim = 128 is not hidden_size = 64"),
    ("exaone4", {"num_hidden_layers": 4, "layer_types": SLIDES, "sliding_window": 8},
     "4 layers, some with a sliding window.*64"),
    ("exaone_moe", {"layer_types": ["full_attention"] * 4}, "no layer with a sliding window")])
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, settings: dict, said: str,
                                                      tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        to_gguf(other(family, tmp_path / family, **settings), tmp_path / "out.gguf")


def test_other_models_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(**SIZES | {"num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1})
    with pytest.raises(UserError, match=r"model_type = 'qwen3_next'.*llama, mixtral, qwen2, qwen3"):
        to_gguf(save(Qwen3NextForCausalLM(config), tmp_path / "qwen3_next"), tmp_path / "out.gguf")
    sliding = Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **SIZES)
    with pytest.raises(UserError, match="sliding window"):
        to_gguf(save(Qwen2ForCausalLM(sliding), tmp_path / "qwen2"), tmp_path / "out.gguf")
    narrow = LlamaConfig(**SIZES | {"intermediate_size": 40})
    with pytest.raises(UserError, match="rows of 40 numbers, which 32 does not divide"):
        to_gguf(save(LlamaForCausalLM(narrow), tmp_path / "llama"), tmp_path / "out.gguf", "q8_0")


def test_files_are_replaced_only_when_asked(llama_dir: Path, tmp_path: Path, capsys) -> None:
    out, other = tmp_path / "model.gguf", tmp_path / "notes.txt"
    other.write_text("notes")
    to_gguf(llama_dir, out, "f32")
    before = out.read_bytes()
    assert main(["convert", "to-gguf", str(llama_dir), str(out), "--type", "q8_0"]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_bytes() == before
    assert main(["convert", "to-gguf", str(llama_dir), str(out), "--type", "q8_0", "--overwrite"]) == 0
    assert field(out, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert main(["convert", "to-gguf", str(llama_dir), str(other), "--overwrite"]) == 2
    assert other.read_text() == "notes"
    assert main(["convert", "to-gguf", str(tmp_path / "nowhere"), str(tmp_path / "x.gguf")]) == 2

"""GGUF files by `convert to-gguf`, run by llama.cpp itself beside transformers and our tokenizers.

Usage: python benchmarks/gguf_llama_cpp.py --work FOLDER --package FOLDER --library FOLDER [--built WORDS]
           [--only CASE ...] > benchmarks/results/gguf_llama_cpp.txt

`package` is a folder with llama-cpp-python's module `llama_cpp` (its source is enough), `library` one with
libllama.so and what it loads; WORDS say what it was built from.  Tiny random models, one for each family that
is written and more for what varies within one, are made by transformers, and of each are printed

  logits     the largest difference of a logit over 96 tokens from transformers', both in float32; and the
             largest logit.  llama.cpp keeps its keys and values in float32 here
  f16, q8_0  the median over tokens of the largest difference, of a file in those; llama.cpp then rounds
             what is multiplied to those, too, and a token that other experts get differs by more
  greedy     tokens of a continuation of 32, from 16 tokens of the text, that are transformers'

and of each tokenizer that is written: texts whose ids are those of `tokenizers`, ids at which llama.cpp ends
generation, and ours.  A bound that is broken ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import unicodedata
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, PROMPT, NEW = 96, 16, 32
BOUNDS = {"f32": 2e-5, "f16": 1e-2, "q8_0": 0.1}
"""Difference of a logit, of the largest logit, that passes: rounding to 11 and to 8 bits, over some ten
products one behind the other, and what other experts of earlier tokens add."""
VOCAB = 2048
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
PLAIN = {"rope_type": "default", "rope_theta": 50_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0}
SLIDES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
          "moe_intermediate_size": 32, "routed_scaling_factor": 1.7}
EXAONE_MOE = {"num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 3, "sliding_window": 8,
              "moe_intermediate_size": 32, "routed_scaling_factor": 2.5, "num_hidden_layers": 5,
              "layer_types": [*SLIDES, "sliding_attention"], "head_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, linear": ("qwen3", {"head_dim": 32, "rope_parameters": LINEAR}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
                                "moe_intermediate_size": 32, "head_dim": 32}),
    "exaone4, 1.2B": ("exaone4", {"layer_types": ["full_attention"] * 3, "sliding_window": None,
                                  "rope_parameters": LLAMA3}),
    "exaone4, 32B": ("exaone4", {"layer_types": SLIDES * 16, "sliding_window": 8, "num_hidden_layers": 64,
                                 "rope_parameters": LLAMA3}),
    "exaone_moe": ("exaone_moe", EXAONE_MOE),
    "exaone_moe, groups": ("exaone_moe", {**EXAONE_MOE, "n_group": 4, "topk_group": 2}),
    "exaone_moe, yarn": ("exaone_moe", {**EXAONE_MOE, "rope_parameters": YARN}),
    "solar_open": ("solar_open", {**ROUTED, "head_dim": 32}),
    "solar_open, yarn": ("solar_open", {**ROUTED, "head_dim": 32, "rope_parameters": YARN}),
    "solar_open, groups": ("solar_open", {**ROUTED, "head_dim": 32, "n_group": 4, "topk_group": 2}),
    "glm4_moe": ("glm4_moe", {**ROUTED, "head_dim": 32, "first_k_dense_replace": 1, "use_qk_norm": True,
                              "attention_bias": True, "rope_parameters": {
                                  **PLAIN, "partial_rotary_factor": 0.5}}),
}
"""Name -> model type of transformers, and what it has beside `SIZES`."""
TEXTS = [
    "The quick brown fox doesn't jump; it's 12,345 times lazier than they'll admit.",
    "Wir hätten's gern, déjà vu: naïve café, 3.14159 €!",
    "대한민국의 수도는 서울이다. 2026년 11월, 인구는 약 9,400,000명입니다!",
    "훈민정음(訓民正音)은 세종대왕이 1443년에 창제한 문자이다...",
    "def f(x: int) -> str:\n    return f\"{x:>8}\"  # tabs\t\there\n\n\nif __name__ == '__main__':\n\tf(1)\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x7fff; } /* done */\r\n\r\n",
    "   three blanks, then two  , one , none\n   \n\n  \t end   ",
    " ", "\n", "  \n\n  ", "a", "'s", "I'M he'Ll WE'D", "1234567890 12 3456", "https://example.org/a?b=1&c=2#d",
    "日本語とカタカナ、中文字符。", "กำลังทดสอบ ภาษาไทย", "🙂👨\u200d👩\u200d👧 emoji\u200b zero",
    "\u00a0no\u2003break\u3000", "x" * 200 + " " * 50 + "y", "السلام عليكم 123", "a/b\\c//d\n/e",
    "한국어 문장에 English words와 숫자 42가 섞여 있다.",
]


def model(name: str) -> Any:
    """Return a random model of a case, whose norms, biases and sinks are no ones and zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CASES[name]
    torch.manual_seed(0)
    # a copy: transformers writes into what it is given
    config = AutoConfig.for_model(kind, **deepcopy(SIZES | {"rope_parameters": PLAIN} | settings))
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for own, tensor in (*made.named_parameters(), *made.named_buffers()):
        if "norm" in own:
            tensor.data += 0.1 * torch.randn(tensor.shape)
        if own.endswith("bias"):
            tensor.data = 0.2 * torch.randn(tensor.shape)
    return made


def written(work: Path, name: str, tokenizer: Path, made: Any, *types: str) -> dict[str, str]:
    """Return the GGUF files of a case by type."""
    import shutil

    from megatron_sov.convert.gguf_export import to_gguf

    folder = work / name.replace(", ", "-")
    made.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    files = {type_: work / f"{folder.name}-{type_}.gguf" for type_ in types}
    for type_, file in files.items():
        to_gguf(folder, file, type_, overwrite=True)
    return {type_: str(file) for type_, file in files.items()}


def child(options: argparse.Namespace, request: dict[str, Any]) -> Any:
    """Return what a process with llama.cpp answers, or the last words of one that ended."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child"], capture_output=True,
        input=json.dumps(request), text=True, check=False, env=os.environ | {
            "PYTHONPATH": f"{options.package}:{os.environ.get('PYTHONPATH', '')}",
            "LLAMA_CPP_LIB_PATH": str(options.library), "LD_LIBRARY_PATH": str(options.library)})
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        words = [line for line in done.stderr.splitlines() if "rror" in line or "ASSERT" in line]
        return f"refused: {' / '.join(words[:2] or done.stderr.splitlines()[-2:])}"
    return json.loads(line.removeprefix("FOUND "))


def answer(request: dict[str, Any]) -> Any:
    """Return, in a process with llama.cpp, a greedy continuation, having saved logits [tokens, ids] beside
    each file; or ids of texts and those that end generation."""
    import llama_cpp

    if "texts" in request:
        llm = llama_cpp.Llama(request["file"], vocab_only=True, verbose=False)
        vocab = llama_cpp.llama_model_get_vocab(llm._model.model)
        ends = [i for i in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
        return {"ends": ends, "ids": [llm.tokenize(text.encode(), add_bos=False, special=True)
                                      for text in request["texts"]]}
    ids, new = request["ids"], []
    for type_, file in request["files"].items():
        llm = llama_cpp.Llama(file, n_ctx=256, n_batch=256, n_ubatch=256, n_threads=1, logits_all=True,
                              type_k=0, type_v=0, flash_attn=False, verbose=False)
        llm.eval(ids)
        np.save(f"{file}.npy", llm.scores[:len(ids)])
        llm.reset()
        llm.eval(ids[:PROMPT])
        while type_ == "f32" and len(new) < NEW:
            new.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            llm.eval(new[-1:])
    return {"new": new}


def measure(options: argparse.Namespace, name: str, tokenizer: Path) -> bool:
    """Print a case's line; return whether it holds."""
    import torch

    made = model(name)
    ids = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = made(ids, use_cache=False).logits[0].numpy()
        row = ids[:, :PROMPT]
        for _ in range(NEW):
            row = torch.cat([row, made(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = row[0, PROMPT:].tolist()
    files = written(options.work, name, tokenizer, made, *BOUNDS)
    largest, told, holds = float(np.abs(ours).max()), [], True
    found = child(options, {"files": files, "ids": ids[0].tolist()})
    if isinstance(found, str):
        print(f"{name:<20}{found}", flush=True)
        return False
    for type_, file in files.items():
        of_tokens = np.abs(np.load(f"{file}.npy") - ours).max(1)
        apart = float(of_tokens.max() if type_ == "f32" else np.median(of_tokens))
        holds = holds and apart <= BOUNDS[type_] * largest
        told.append(f"{apart:>10.1e}")
        if type_ == "f32":
            same = sum(a == b for a, b in zip(found["new"], expected, strict=True))
            told.append(f"{largest:>9.1f}{same:>5} of {NEW}")
            holds = holds and same == NEW
    print(f"{name:<20}{''.join(told)}   {'' if holds else 'BROKEN'}", flush=True)
    return holds


def tokenizers(work: Path) -> dict[str, Path]:
    """Return a folder for each way of splitting that is written: our presets', and others of
    `gguf_export.SPLITS`."""
    from growing import Work
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_sov.convert.gguf_export import SPLITS

    made = Work(work)
    corpus = made.made("corpus", "data_prep.cli", "demo-corpus", "--output", "OUT", manifest="english.jsonl")
    texts = [corpus / "english.jsonl", corpus / "code.jsonl"]
    found = {preset: made.made(f"tokenizer-{preset}", "tokenizer.cli", "train", "--preset", preset,
                               "--vocab-size", str(VOCAB), "--input", *texts, "--output", "OUT",
                               manifest="tokenizer.json") for preset in ("solar-open", "k-exaone")}
    lines = [json.loads(line)["text"] for file in texts for line in file.read_text().splitlines()[:200]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ways = {"gpt-2": (False, pre_tokenizers.ByteLevel(add_prefix_space=False))} | {
        name: (ignores, pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]))
        for split, names in SPLITS.items() for ignores, name in names.items()}
    for name, (ignores, way) in ways.items():
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignores))
        tokenizer.pre_tokenizer, tokenizer.decoder = way, decoders.ByteLevel()
        tokenizer.train_from_iterator([*lines, *TEXTS * 3], trainers.BpeTrainer(
            vocab_size=VOCAB, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|pad|>", "<|endoftext|>", "<|begin|>"]))
        found[name] = folder = work / f"tokenizer-{name}"
        if (folder / "tokenizer_config.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>"}))
    return found


def texts_of(work: Path) -> list[str]:
    """Return the texts that are split: those above, and 400 of the corpus, in composed characters."""
    lines = [json.loads(line)["text"][:2000] for name in ("english", "code")
             for line in (work / f"corpus/{name}.jsonl").read_text().splitlines()[-200:]]
    special = ["<|begin|>user\n안녕하세요 <|endoftext|> x", "<|user|>\nhi<|endofturn|>\n"]
    return [unicodedata.normalize("NFC", text) for text in (*TEXTS, *special, *lines)]


def split(options: argparse.Namespace, name: str, folder: Path) -> bool:
    """Print a tokenizer's line; return whether llama.cpp gives its ids."""
    from tokenizers import Tokenizer

    from megatron_sov.convert.gguf_export import read_tokenizer

    made, texts = model("llama"), texts_of(options.work)
    file = written(options.work, "llama", folder, made, "f32")["f32"]
    own, told = Tokenizer.from_file(str(folder / "tokenizer.json")), read_tokenizer(folder, VOCAB)
    found = child(options, {"file": file, "texts": texts})
    if isinstance(found, str):
        print(f"{name:<20}{found}", flush=True)
        return False
    wanted = [own.encode(text).ids for text in texts]
    apart = [text for text, a, b in zip(texts, found["ids"], wanted, strict=True) if a != b]
    ends = {"llama.cpp": found["ends"], "ours": [told.ids[f] for f in ("eos", "eot", "eom") if f in told.ids]}
    print(f"{name:<20}{told.split:<12}{len(texts) - len(apart):>5} of {len(texts)}   " + ", ".join(
        f"{who} {[told.tokens[i] for i in ids]}" for who, ids in ends.items())
        + "".join(f"\n      {text[:60]!r}" for text in apart[:5]), flush=True)
    return not apart


def main() -> int:
    """Make, ask, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--package", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--built", default="not said")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        print("FOUND " + json.dumps(answer(json.load(sys.stdin))))
        return 0
    options.work = options.work.absolute()
    folders = tokenizers(options.work)
    bounds = ", ".join(f"{type_} {bound:g}" for type_, bound in BOUNDS.items())
    print(f"llama.cpp: {options.built}\n{platform.machine()}, Python {platform.python_version()}; bounds of "
          f"a difference, of the largest logit: {bounds}\n\n"
          f"{'model':<20}{'logits':>10}{'largest':>9}{'greedy':>11}{'f16':>10}{'q8_0':>10}", flush=True)
    holds = [measure(options, name, folders["solar-open"]) for name in options.only]
    print(f"\n{'tokenizer':<20}{'in GGUF':<12}{'texts':>12}   ends of generation")
    holds += [split(options, name, folder) for name, folder in folders.items()]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What is lost and saved where a trained model leaves in 8 and 4 bits, and who reads the folders.

Usage: python benchmarks/low_bit.py --work FOLDER [--reader PYTHON] [--vllm PYTHON] [--steps 150]
           [--models dense experts] [--seeds 0 1 2]

Tiny models, one dense and one with experts, learn text that any machine has (`growing.Work`), and leave
by `convert to-hf` in bfloat16 and in each format of `--quantize`.  Of each folder are printed, as means over
seeds with 95 % intervals (Student's t),

  size       bytes of its weights, beside those of bfloat16
  bits       bits per byte of 2,048 tokens of the text: the numbers that our reader makes of the folder,
             written in 16 bits and run by transformers in float32
  more       how many more than in bfloat16, a difference for each seed
  logits     the largest difference of a logit from bfloat16's there, of the largest of those
  readers    the largest difference of transformers' own reading from that, with PYTHON's packages
             (compressed-tensors), and of vLLM's prompt log-probabilities, of all seeds the worst; or what it
             says instead

transformers and vLLM are asked in processes of their own, by Pythons that may be others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growing import Work
from seeds import over_seeds

from megatron_sov import convert

FORMATS = ("bfloat16", "fp8-block", "fp8-tensor", "mxfp4", "nvfp4")
WIDE = ("model.hidden_size=128", "model.head_dim=32", "train.global_batch_size=8", "train.micro_batch_size=8",
        "optim.lr=3e-3", "optim.schedule=linear", "optim.min_lr=1e-4", "train.checkpoint_every_steps=1000")
MODELS = {"dense": ("tiny-llama", ("model.dense_ffn_dim=256", "model.llama3_rope=null")),
          "experts": ("tiny-solar-open", ("model.num_experts=8", "model.num_experts_per_token=2",
                                          "model.expert_ffn_dim=128", "model.yarn=null"))}
TEXTS, TOKENS = 16, 128


def folders(work: Work, name: str, seed: int, steps: int) -> dict[str, tuple[Path, Path]]:
    """Return, by format, a model's folder and what our reader makes of it, in bfloat16."""
    recipe, settings = MODELS[name]
    trained = work.train(f"{name}-{seed}", recipe, None, *WIDE, *settings, f"train.steps={steps}",
                         f"train.seed={seed}")
    found = {}
    for form in FORMATS:
        few, read, plain = (work.folder / f"{name}-{seed}-{form}{what}" for what in ("", "-read", "-plain"))
        if form == FORMATS[0]:
            plain = few
            convert.to_hf(trained, few, dtype=form, overwrite=True, workers=1)
        else:
            convert.to_hf(trained, few, quantize=form, overwrite=True, workers=1)
            convert.from_hf(few, read, overwrite=True, workers=1)
            convert.to_hf(read, plain, dtype=FORMATS[0], overwrite=True, workers=1)
        found[form] = few, plain
    return found


def size(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def child(python: str, what: str, listed: list[tuple[Path, Path]], texts: Path) -> list[Any]:
    """Return what a process of another Python finds of each folder."""
    told = [[str(path) for path in pair] for pair in listed]
    done = subprocess.run([python, "-W", "ignore", __file__, "--child", what, json.dumps([told, str(texts)])],
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        return [f"{what} ended with {done.returncode}: {done.stderr.strip()[-300:]}"] * len(listed)
    return list(json.loads(line.removeprefix("FOUND ")))


def tokens_of(folder: str, texts: str) -> list[list[int]]:
    """Return the ids of some texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for line in Path(texts).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        if len(ids) >= TOKENS and len(rows) < TEXTS:
            rows.append(ids[:TOKENS])
    return rows


def by_transformers(listed: list[list[str]], texts: str) -> list[Any]:
    """Return for each (folder, what our reader made of it): bits per byte of the latter, the largest
    difference of its logits from the first folder's, of the largest one, and of transformers' own reading
    from them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_sov.model.pretrained import low_bit_options

    rows = torch.tensor(tokens_of(listed[0][0], texts))
    decode = AutoTokenizer.from_pretrained(listed[0][0]).decode
    bytes_read = sum(len(decode(row[1:]).encode()) for row in rows)

    def logits(folder: str) -> Any:
        options = {"dtype": "bfloat16", **low_bit_options(Path(folder))}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.no_grad():
            return model.float().eval()(rows, use_cache=False).logits

    found: list[Any] = []
    first = logits(listed[0][1])
    for folder, plain in listed:
        ours = logits(plain)
        lost = float((ours - first).abs().max() / first.abs().max())
        nats = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), rows[:, 1:].flatten(),
                                                 reduction="sum")
        bits = float(nats) / math.log(2) / bytes_read
        try:
            found.append([bits, lost, float((logits(folder) - ours).abs().max())])
        except Exception as e:  # what a library says is the result
            found.append([bits, lost, f"{type(e).__name__}: {str(e)[:150]}"])
    return found


def by_vllm(listed: list[list[str]], texts: str) -> list[Any]:
    """Return the largest difference of log-probabilities of a text's tokens, from those of what our reader
    made of the folder, by transformers; or what vLLM says."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    rows, found = tokens_of(listed[0][0], texts)[:4], []
    for folder, plain in listed:
        try:
            model = LLM(folder, dtype="float32" if folder == plain else "bfloat16", enforce_eager=True,
                        max_model_len=2 * TOKENS, skip_tokenizer_init=True)
            told = model.generate([{"prompt_token_ids": row} for row in rows], SamplingParams(
                max_tokens=1, prompt_logprobs=0, detokenize=False))
            theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
            with torch.no_grad():
                expected = theirs(torch.tensor(rows)).logits.log_softmax(-1)
            found.append(max(abs(float(expected[i, n - 1, row[n]]) - one.prompt_logprobs[n][row[n]].logprob)
                             for i, (row, one) in enumerate(zip(rows, told, strict=True))
                             for n in range(1, TOKENS)))
            del model
        except Exception as e:  # what a library says is the result
            found.append(f"{type(e).__name__}: {str(e)[:150]}")
        cleanup_dist_env_and_memory()
    return found


def told(values: Sequence[Any]) -> str:
    """Return the largest of some figures, or the first words among them."""
    words = next((value for value in values if isinstance(value, str)), None)
    return " ".join(words.split()) if words is not None else f"{max(values):.1e}"


def report(name: str, sizes: Sequence[int], read: Sequence[Any], engine: Sequence[Any]) -> None:
    """Print a model's table.

    Args:
        name: the model's.
        sizes: bytes of each format's weights.
        read: by seed and format, what `by_transformers` found.
        engine: by seed and format, what `by_vllm` found.
    """
    print(f"\n{name:<12}{'bytes':>10}{'of 16 bits':>12}{'bits/byte':>18}{'more':>21}{'logits':>18}   "
          "transformers, vLLM")
    for i, form in enumerate(FORMATS):
        of_form = [seed[i] if isinstance(seed[i], list) else [math.nan, math.nan, seed[i]] for seed in read]
        bits, lost, own = zip(*of_form, strict=True)
        more = [here - seed[0][0] for here, seed in zip(bits, read, strict=True)] if i else []
        print(f"{form:<12}{sizes[i]:>10,}{sizes[i] / sizes[0]:>12.3f}{over_seeds(bits, '.4f'):>18}"
              f"{over_seeds(more, '+.5f') if more else '':>21}{over_seeds(lost, '.4f'):>18}   {told(own)}, "
              f"{told([seed[i] for seed in engine])}", flush=True)


def main() -> None:
    """Train, write, read, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--reader", default=sys.executable)
    parser.add_argument("--vllm")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        listed, texts = json.loads(args.child[1])
        found = (by_vllm if args.child[0] == "vllm" else by_transformers)(listed, texts)
        print("FOUND " + json.dumps(found))
        return
    work = Work(args.work.absolute())
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; seeds {', '.join(map(str, args.seeds))}; {args.steps} steps")
    for name in args.models:
        made = [list(folders(work, name, seed, args.steps).values()) for seed in args.seeds]
        texts = work.folder / "corpus/english.jsonl"
        read = [child(args.reader, "transformers", seed, texts) for seed in made]
        engine = [child(args.vllm, "vllm", seed, texts) if args.vllm else ["not asked"] * len(FORMATS)
                  for seed in made]
        report(name, [size(few) for few, _ in made[0]], read, engine)


if __name__ == "__main__":
    main()

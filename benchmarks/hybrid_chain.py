"""A tiny Solar Open 2: trained, extended, fine-tuned, adapted, exported, served.

Usage: python benchmarks/hybrid_chain.py --work FOLDER [--print], from the checkout

`tiny-solar-open2` has one layer of gated softmax attention and three of Kimi Delta Attention with rates of
up to 2, no positions, 8 experts in every layer of which 2 are visited and one shared, and 2,048 token ids of
the preset `solar-open`.  Its sizes, data and rates are ours.

Every stage is an ordinary command, but for `convert verify`: transformers 5.23 has no class of Solar Open 2,
and reads the folder by the one that `tests/solar_open2.py` makes of its class of Solar Open.  Two of the
models read held-out text.  At the end the exported folder is served, and the same questions are put to it
and, by `generate`, to the run.
Stages that ended are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from seed_runs import rows_of, run, words

RECIPE = "tiny-solar-open2"
OFTEN = ("train.num_threads=1", "train.global_batch_size=8", "train.micro_batch_size=8",
         "train.checkpoint_every_steps=1000", "train.eval_every_steps=0", "guards.sigma=0")
STAGES = ("pretrain", "extend", "sft", "lora")
READ = ("pretrain", "sft")
"""What reads held-out text."""
QUESTIONS = ("How many days has a week?", "What is 2 plus 2?", "Name a colour.")
STEPS = {"pretrain": 60, "extend": 10, "sft": 30, "lora": 10}


def commands(work: Path) -> dict[str, list[str | Path]]:
    """Return what is run, by the file or folder that it leaves."""
    texts: list[str | Path] = [part for kind in ("english", "code")
                               for part in ("--input", work / f"corpus/{kind}.jsonl")]
    pack: list[str | Path] = ["data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--workers", "1"]

    def learn(command: str, name: str, start: str, data: list[str | Path], *settings: str,
              recipe: tuple[str, ...] = (RECIPE,)) -> list[str | Path]:
        begin: list[str | Path] = ["--from", work / start] if start else []
        return ["megatron_sov", command, *recipe, *begin, *data, "--run", work / name, "--resume",
                *words([*OFTEN, f"train.steps={STEPS[name]}", *settings])]

    text: list[str | Path] = ["--data", work / "tokens"]
    chats: list[str | Path] = ["--data", f"{work / 'chats'}:0.8", "--data", f"{work / 'tokens'}:0.2"]
    taught = ("objective.text_coeff=0.1", "optim.lr=1e-3", rows_of(256))
    return {
        "corpus/english.jsonl": ["data_prep.cli", "demo-corpus", "--output", work / "corpus", "--overwrite"],
        "tokenizer": ["tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "2048", *texts,
                      "--output", work / "tokenizer"],
        "tokens": [*pack, *texts, "--heldout", "0.05", "--output", work / "tokens"],
        "chats": [*pack, "--format", "chat", "--input", work / "corpus/chat.jsonl", "--output",
                  work / "chats"],
        "pretrain": learn("pretrain", "pretrain", "", text, rows_of(128), "data.max_epochs=0"),
        "extend": learn("extend", "extend", "pretrain", text, "optim.lr=1e-3", "train.micro_batch_size=2",
                        "needle.samples=2", "data.max_epochs=0"),
        "sft": learn("sft", "sft", "extend", chats, *taught, "data.max_epochs=0"),
        "lora": learn("sft", "lora", "sft", chats, *taught, "lora.rank=8", "data.max_epochs=0"),
        "hf": ["megatron_sov", "convert", "to-hf", work / "lora", work / "hf", "--dtype", "bfloat16"],
        "verify.json": ["tests.solar_open2", "convert", "verify", work / "lora", work / "hf", "--card",
                        work / "verify.json"],
        **{f"{name}.ppl.json": ["megatron_sov", "eval", "ppl", work / name, *text, "--seq-len", "256",
                                "--max-tokens", "16384", "--output", work / f"{name}.ppl.json"]
           for name in READ}}


def ended(place: Path) -> bool:
    """Return whether a command has left what it makes."""
    if place.name in STAGES:
        return (place / "complete.json").exists()
    return place.exists()


def served(folder: Path, file: Path, log: Path) -> tuple[list[str], int]:
    """Return a served folder's answers to the questions, and the kilobytes that its processes have at most
    more behind an answer of 400 tokens than behind one of 50."""
    with open(log, "a") as out:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "megatron_sov", "serve", folder, "--port", "0", "--name",
             "mine", "--max-length", "2048", "--max-batch", "1", "--address-file", file, "--parent-pid",
             str(os.getpid())], stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not file.exists():
            if server.poll() is not None:
                raise SystemExit(f"serve ended with exit code {server.returncode}; see {log}")
            time.sleep(0.5)
        url = json.loads(file.read_text())["url"]

        def ask(question: str, tokens: int, **more: Any) -> str:
            body = {"model": "mine", "messages": [{"role": "user", "content": question}], "temperature": 0,
                    "max_tokens": tokens, **more}
            request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            message = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
            return (message.get("reasoning_content") or "") + (message["content"] or "")

        answers = [ask(question, 32) for question in QUESTIONS]
        ask(QUESTIONS[0], 50, ignore_eos=True)
        before = resident(server.pid)
        ask(QUESTIONS[0], 400, ignore_eos=True)
        return answers, resident(server.pid) - before
    finally:
        server.terminate()
        server.wait()


def resident(pid: int) -> int:
    """Return the kilobytes that a process and all below it hold."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.partition("VmRSS:")[2].split()[0])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident(int(child)) for child in children)


def generated(target: Path, out: Path, log: Path) -> list[str]:
    """Return what `generate` writes to the questions."""
    if not out.exists():
        asked = [part for question in QUESTIONS for part in ("--prompt", question)]
        run(log, "megatron_sov", "generate", target, *asked, "--chat", "--max-new-tokens", "32", "--engine",
            "megatron", "--output", out)
    return [json.loads(line)["response"] for line in out.read_text().splitlines()]


def bits(file: Path) -> str:
    """Return bits per byte by source."""
    return ", ".join(f"{source} {found['bits_per_byte']:.4f}"
                     for source, found in json.loads(file.read_text()).items())


def report(work: Path) -> None:
    """Print what came of each stage."""
    print("held-out text, bits per byte:")
    for name in READ:
        print(f"  {name:<9}{f'{STEPS[name]} steps' if name in STEPS else 'bfloat16':<11}"
              f"{bits(work / f'{name}.ppl.json')}")
    card = json.loads((work / "verify.json").read_text())
    print("convert verify of the run with its adapter beside the folder, by transformers:")
    for check in card["checks"]:
        name = check["name"].rpartition(": ")[2]
        print(f"  {name}: {check['value']:.2g}, limit {check['limit']:.2g}")
    found = json.loads((work / "served.json").read_text())
    print(f"served answers that are those of generate on the folder: {found['same']} of {len(QUESTIONS)}")
    print(f"memory behind an answer of 400 tokens: {found['more_kb'] / 1024:+.1f} MiB on that behind one "
          "of 50")
    for question, answer in zip(QUESTIONS, found["answers"], strict=True):
        print(f"  {question!r} -> {answer!r}")


def main() -> None:
    """Go the stages, serve, and print what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    work = args.work.absolute()
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    if not args.only_print:
        for name, command in commands(work).items():
            if not ended(work / name):
                print(f"{name} {time.strftime('%H:%M')}", file=sys.stderr, flush=True)
                run(work / "log", *command)
        if not (work / "served.json").exists():
            answers, more = served(work / "hf", work / "address.json", work / "log")
            same = sum(a == b for a, b in zip(answers, generated(work / "hf", work / "generated.jsonl",
                                                                  work / "log"), strict=True))
            (work / "served.json").write_text(json.dumps({"answers": answers, "more_kb": more, "same": same}))
    report(work)


if __name__ == "__main__":
    main()

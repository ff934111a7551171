"""`make demo`: from raw text on this machine to a judged model in Hugging Face form,
through the ordinary commands.

Each stage is one command that a user could type; the demo prints it, runs it, and compares its time with a
written budget for two cores.  A killed demo continues where it was: complete artifacts are kept, and runs
resume from their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs")
RECIPE = "tiny-solar-open"
VOCAB_SIZE = 1024
NPROC = 2
GATE_FAILED = 3
"""Exit code of an extension whose gate has not passed within its steps."""
PRETRAIN_STEPS, EXTEND_STEPS, SFT_STEPS, DPO_STEPS = 320, 60, 80, 24
RETRIEVAL_RECIPE, RETRIEVAL_STEPS, GATE_STEPS, GATE_MAX_STEPS = "tiny-k-exaone", 320, 80, 400
NEAR, FAR = 80, 256
"""Tokens at which a small K-EXAONE learns to retrieve, and those at which its gate stands."""
SEQ_LEN, LONG_SEQ_LEN = 256, 512
TEXTS = ("The standard library ", "def read_file(path):\n")
QUESTIONS = ("What does `textwrap.dedent` do?", "What does `os.path.join` do?")
OPENING = "In short: "
"""Half of the chats' answers open with it; of a pair the answer that does not is the better one."""
STRAIGHT = f"(?!{OPENING.strip()}).+"
"""What an answer has to match for the rule."""
SAMPLING = ("--max-new-tokens", "48", "--temperature", "0.3")
"""A model of this size writes few words that exist at 0.7, and the same ones again and again at 0."""
FREQUENT = 50
"""Times that a word stands in the corpus."""
NUM_PAIRS, NUM_ASKED = 800, 32
"""Chats that become pairs, and those whose questions are kept for the rule; the others are fine-tuned on."""
PHASES = (("foundation", 0.7, {"english": 0.5, "code": 0.35, "korean": 0.15}),
          ("korean and code", 0.3, {"english": 0.4, "code": 0.3, "korean": 0.3}))
"""Two phases of pretraining: name, share of the steps, blend."""


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    name: str
    """Name in the table of times."""
    budget_s: int
    """Seconds that it may take on two cores."""
    command: tuple[str, ...]
    """Program and arguments."""
    done: Path | None = None
    """What exists when the stage is complete; it is skipped then."""
    codes: tuple[int, ...] = (0,)
    """Exit codes that let the demo go on."""


def sources_of(corpus: Path) -> list[str]:
    """Return the names of the text sources that the corpus holds."""
    return sorted(p.stem for p in corpus.glob("*.jsonl") if p.stem not in ("chat", "judged"))


def main_language(sources: list[str]) -> str:
    """Return the source that retrieval is learned in."""
    return next((s for s in sources if s == "english"), sources[0])


def phases(sources: list[str]) -> str:
    """Return the curriculum as JSON for --set, over the sources that are there."""
    described = []
    for name, share, blend in PHASES:
        known = {s: w for s, w in blend.items() if s in sources} or dict.fromkeys(sources, 1.0)
        described.append({"name": name, "share": share, "seq_len": SEQ_LEN, "blend": known})
    return json.dumps(described)


def settings(**values: object) -> list[str]:
    """Return --set arguments; double underscores stand for dots."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def corpus_stage(root: Path, user: str | None) -> Stage:
    """Return the stage that gathers the text."""
    corpus = root / "corpus"
    own = ("--input", user) if user else ()
    return Stage("corpus", 30, ("sov-data", "demo-corpus", "--output", str(corpus), *own),
                 corpus / "manifest.json")


def split_chats(root: Path) -> None:
    """Divide the corpus' chats into those to fine-tune on, pairs to prefer by, and questions that no stage
    learns an answer to.

    The two answers of a pair differ in the opening alone, so a rule can tell what was learned: a model that
    was fine-tuned on the chats opens its answers so half of the time or more, and one that has learned from
    the pairs seldom.
    """
    folder, unfinished = root / "conversations", root / "conversations.part"
    if folder.exists():
        return
    lines = (root / "corpus/chat.jsonl").read_text(encoding="utf-8").split("\n")
    found = [(question["content"], answer["content"])
             for question, answer in (json.loads(line)["messages"] for line in lines if line)]
    random.Random(0).shuffle(found)
    # of few chats a part
    num_asked, num_pairs = min(NUM_ASKED, len(found) // 8), min(NUM_PAIRS, len(found) // 4)
    asked, pairs, chats = (found[:num_asked], found[num_asked:num_asked + num_pairs],
                           found[num_asked + num_pairs:])
    records = {
        "questions": [{"prompt": question, "target": answer} for question, answer in asked],
        "pairs": [{"prompt": question, "chosen": answer, "rejected": OPENING + answer}
                  for question, answer in pairs],
        "chat": [{"messages": [{"role": "user", "content": question},
                               {"role": "assistant", "content": (OPENING if i % 2 else "") + answer}]}
                 for i, (question, answer) in enumerate(chats)]}
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, rows in records.items():
        (unfinished / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.rename(folder)


def data_stages(root: Path, sources: list[str]) -> list[Stage]:
    """Return the stages from text to token shards."""
    files = [str(root / "corpus" / f"{s}.jsonl") for s in sources]
    inputs = [word for f in files for word in ("--input", f)]
    tokenizer, text, retrieval, chat, pairs = (
        root / name for name in ("tokenizer", "text", "retrieval-text", "chat", "pairs"))
    pack = ("sov-data", "pack", "--tokenizer", str(tokenizer))
    return [
        Stage("tokenizer", 15, ("sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size",
                                str(VOCAB_SIZE), *inputs, "--output", str(tokenizer)),
              tokenizer / "manifest.json"),
        Stage("pack text", 15, (*pack, *inputs, "--output", str(text)), text / "manifest.json"),
        Stage("pack one text", 5, (*pack, "--input", str(root / "corpus" / f"{main_language(sources)}.jsonl"),
                                   "--output", str(retrieval)), retrieval / "manifest.json"),
        Stage("pack chats", 10, (*pack, "--input", str(root / "conversations/chat.jsonl"), "--format", "chat",
                                 "--output", str(chat)), chat / "manifest.json"),
        Stage("pack pairs", 5, (*pack, "--input", str(root / "conversations/pairs.jsonl"), "--format",
                                "preference", "--heldout", "0.1", "--output", str(pairs)),
              pairs / "manifest.json"),
    ]


def training_stages(root: Path, sources: list[str]) -> list[Stage]:
    """Return the four runs."""
    text, chat, pairs, pretrain, extend, sft, dpo = (
        str(root / name) for name in ("text", "chat", "pairs", "pretrain", "extend", "sft", "dpo"))
    layout = ("--nproc", str(NPROC), "--resume", *settings(parallel__ep=2))
    batch = settings(train__global_batch_size=8, train__micro_batch_size=4)
    first = settings(model__vocab_size=VOCAB_SIZE, model__num_layers=2, data__phases=phases(sources),
                     train__steps=PRETRAIN_STEPS, train__checkpoint_every_steps=100,
                     train__eval_every_steps=160, optim__name="muon", optim__muon_scale="original",
                     optim__lr=2e-2, optim__min_lr=1e-3)
    longer = settings(train__steps=EXTEND_STEPS, train__global_batch_size=4, train__micro_batch_size=2,
                      optim__lr=1e-3, optim__min_lr=2e-4,
                      data__phases=json.dumps([{"name": "extend", "seq_len": LONG_SEQ_LEN}]),
                      needle__lengths_tokens=json.dumps([SEQ_LEN, LONG_SEQ_LEN]),
                      # all three would take thrice as long
                      needle__languages=json.dumps([s for s in sources if s == "english"]),
                      needle__samples=10)
    chats = settings(train__steps=SFT_STEPS, optim__lr=1e-3, optim__min_lr=2e-4, objective__text_coeff=0.1)
    # held to the better answers, for two words alone decide: at 0.2 answers became half as long, at 1 few
    # pairs were ranked right
    preferred = settings(train__steps=DPO_STEPS, optim__lr=3e-4, optim__min_lr=2e-4, preference__beta=0.5,
                         preference__chosen_coeff=0.5)
    return [
        Stage("pretrain", 100, ("megatron-sov", "pretrain", RECIPE, "--data", text, "--run", pretrain,
                                *layout, *batch, *first), root / "pretrain/complete.json"),
        Stage("extend", 30, ("megatron-sov", "extend", RECIPE, "--from", pretrain, "--data", text, "--run",
                             extend, *layout, *longer), root / "extend/complete.json"),
        # what the model says to chats before it has learned from any
        Stage("chats before", 10, ("megatron-sov", "eval", "ppl", extend, "--data", chat, "--run", extend)),
        Stage("sft", 30, ("megatron-sov", "sft", RECIPE, "--from", extend, "--data", f"{chat}:0.8", "--data",
                          f"{text}:0.2", "--run", sft, *layout, *batch, *chats), root / "sft/complete.json"),
        Stage("dpo", 15, ("megatron-sov", "prefer", RECIPE, "--from", sft, "--data", pairs, "--run", dpo,
                          "--method", "dpo", *layout, *batch, *preferred), root / "dpo/complete.json"),
    ]


def retrieval_stages(root: Path, sources: list[str]) -> list[Stage]:
    """Return the runs of a small K-EXAONE that learns to retrieve, and whose context is then
    extended behind a gate.

    The gate fails before the first step.  On text that is too hard for the steps it may fail to the end; the
    report says so.  Manual pages repeat one another, so that more of the held-out text may stand in the
    training text than by default.

    The shards hold nothing but the text that these runs learn: the gate compares held-out losses of all that
    it is given, and those on text that a stage neither learns nor rehearses drift by more than any tolerance.
    """
    text, begin, near, far = (str(root / name) for name in ("retrieval-text", "retrieval-begin", "retrieval",
                                                            "retrieval-far"))
    language = main_language(sources)
    layout = ("--data", text, "--nproc", str(NPROC), "--resume")
    sizes = settings(model__vocab_size=VOCAB_SIZE, model__num_layers=2, model__attention_pattern="LG",
                     model__num_dense_layers=1, model__hidden_size=64, model__dense_ffn_dim=128,
                     model__num_experts=4, model__expert_ffn_dim=64, model__sliding_window_tokens=16,
                     model__init_std=0.1, model__num_mtp_layers=0)
    common = settings(
        train__eval_every_steps=0, train__checkpoint_every_steps=200, data__heldout_tokens=32768,
        data__max_epochs=0, optim__name="muon", optim__muon_scale="original", optim__weight_decay=0,
        optim__schedule="wsd", optim__decay_share=0.4,
        guards__sigma=0)  # a small model that begins to retrieve has gradients that look like spikes
    extending = [*common, *settings(needle__train_share=0, needle__depths="[0.0, 0.5, 0.95]",
                                    needle__languages=json.dumps([s for s in sources if s == "english"]))]
    batch = settings(train__global_batch_size=24, train__micro_batch_size=12)
    needles = settings(
        data__phases=json.dumps([{"name": "needles", "seq_len": NEAR, "blend": {language: 1, "needle": 7}}]),
        train__steps=RETRIEVAL_STEPS, optim__lr=1e-2, optim__min_lr=1e-3, needle__lengths_tokens=f"[{NEAR}]")
    short = {"name": "rehearsal", "share": 0.25, "blend": {f"{language}/{NEAR}": 1, f"needle/{NEAR}": 1}}
    stage = {"name": str(FAR), "seq_len": FAR, "steps": GATE_STEPS, "max_steps": GATE_MAX_STEPS,
             "blend": {"needle": 1}, "parts": [short]}
    gate = settings(extend__stages=json.dumps([stage]), extend__gate__every_steps=GATE_STEPS,
                    extend__gate__min_accuracy=0.8, extend__gate__loss_tolerance_nats=0.1,
                    train__global_batch_size=4, train__micro_batch_size=2, optim__lr=5e-3, optim__min_lr=5e-4)
    texts = settings(data__phases=json.dumps([{"name": "text", "seq_len": NEAR, "blend": {language: 1}}]),
                     train__steps=20)
    recipe = RETRIEVAL_RECIPE
    return [
        Stage("retrieval: begin", 10, ("megatron-sov", "pretrain", recipe, "--run", begin, *layout, *sizes,
                                       *common, *batch, *texts), root / "retrieval-begin/complete.json"),
        Stage("retrieval: learn", 40, ("megatron-sov", "extend", recipe, "--from", begin, "--run", near,
                                       *layout, *extending, *batch, *needles),
              root / "retrieval/complete.json"),
        Stage("gate", 35, ("megatron-sov", "extend", recipe, "--from", near, "--run", far, *layout,
                           *extending, *gate), root / "retrieval-far/complete.json", codes=(0, GATE_FAILED)),
    ]


def judging_stages(root: Path) -> list[Stage]:
    """Return the stages that prove the export and judge the answers."""
    sft, dpo, hf = (str(root / name) for name in ("sft", "dpo", "hf"))

    def answers(run: str) -> list[Stage]:
        """Return the stages that ask a run, and count the answers that keep to the rule."""
        name = Path(run).name
        rows, rewards = (str(root / f"{what}-{name}.jsonl") for what in ("answers", "rewards"))
        return [
            Stage(f"answers of {name}", 10, (
                "megatron-sov", "generate", run, "--chat", *SAMPLING, *repeated("--prompt", QUESTIONS),
                "--prompts", str(root / "conversations/questions.jsonl"), "--output", rows, "--run", run)),
            Stage(f"rule on {name}", 5, (
                "megatron-sov", "score", "--reward", "format", "--set", f"regex={STRAIGHT}", "--workers", "1",
                "--input", rows, "--output", rewards, "--run", run)),
        ]

    return [
        Stage("export", 10, ("megatron-sov", "convert", "to-hf", dpo, hf), root / "hf/manifest.json"),
        Stage("verify weights and logits", 10, ("megatron-sov", "convert", "verify", dpo, hf, "--run", dpo)),
        *answers(sft), *answers(dpo),
        Stage("transformers", 10, (sys.executable, "-c", TRANSFORMERS_ALONE, hf)),
    ]


def report_stages(root: Path, question: str) -> list[Stage]:
    """Return the stages that show what was made.

    Args:
        root: folder of the demo.
        question: the report sets what was written to it before the chats beside the last answer.
    """
    pretrain, extend, sft, dpo, far = (
        str(root / name) for name in ("pretrain", "extend", "sft", "dpo", "retrieval-far"))
    return [
        Stage("continue text", 15, ("megatron-sov", "generate", extend, *SAMPLING,
                                    *repeated("--prompt", (*TEXTS, question)), "--run", extend)),
        Stage("report", 10, ("megatron-sov", "report", pretrain, extend, sft, dpo, "--output",
                             str(root / "report.html"))),
        # another model: the first one is too small to find needles
        Stage("report of retrieval", 10, ("megatron-sov", "report", far, "--output",
                                          str(root / "retrieval.html"))),
    ]


def readable_question(root: Path) -> str:
    """Return the question whose answer of the last model reads best: the largest share of its words is
    frequent in the corpus, and of equal ones it is the longest."""
    words = Counter(word for file in (root / "corpus").glob("*.jsonl")
                    for word in re.findall(r"[^\W\d_]+", file.read_text(encoding="utf-8").lower()))

    def rank(row: dict[str, str]) -> tuple[float, int]:
        found = re.findall(r"[^\W\d_]+", row["response"].lower())
        return (sum(words[word] >= FREQUENT for word in found) / len(found) if len(found) > 2 else 0.0,
                len(found))

    lines = (root / "answers-dpo.jsonl").read_text(encoding="utf-8").split("\n")
    return str(max((json.loads(line) for line in lines if line), key=rank)["prompt"])


def repeated(flag: str, values: tuple[str, ...]) -> list[str]:
    """Return the flag before each value."""
    return [word for value in values for word in (flag, value)]


TRANSFORMERS_ALONE = """
import sys, torch
from transformers import AutoTokenizer, SolarOpenForCausalLM
model, info = SolarOpenForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("missing keys:", sorted(info["missing_keys"]), " unexpected keys:", sorted(info["unexpected_keys"]))
chat = [{"role": "user", "content": "What does `os.path.join` do?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
sys.exit(bool(info["missing_keys"] or info["unexpected_keys"]))
"""
"""What someone types who has the exported folder and nothing of ours."""


def program(command: tuple[str, ...]) -> list[str]:
    """Return the command with its program found beside this Python."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside) if beside.exists() else command[0], *command[1:]]


def shown(command: tuple[str, ...]) -> str:
    """Return the command as a line to read; an inline program is shortened."""
    words = ["..." if "\n" in w.strip() else w for w in command]
    return " ".join(f"'{w}'" if set(w) & set(" {[\"`(") else w for w in words)


def run(stage: Stage) -> float:
    """Run one stage unless it is complete; returns its seconds.

    Raises:
        SystemExit: with the command's own exit code when it fails.
    """
    if stage.done is not None and stage.done.exists():
        print(f"\n== {stage.name}: complete, kept", flush=True)
        return 0.0
    print(f"\n== {stage.name} (budget {stage.budget_s} s)\n$ {shown(stage.command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(program(stage.command), check=False).returncode
    if code not in stage.codes:
        print(f"demo: stage '{stage.name}' ended with exit code {code}; mend what it says and run the "
              "same command again", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)
    return time.monotonic() - start


def summary(root: Path, times: list[tuple[Stage, float]]) -> None:
    """Print each stage's time beside its budget, and the largest process."""
    print("\nstage                  time   budget")
    for stage, seconds in times:
        print(f"{stage.name:20} {seconds:5.0f} s  {stage.budget_s:5d} s")
    print(f"{'total':20} {sum(s for _, s in times):5.0f} s  {sum(s.budget_s for s, _ in times):5d} s")
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest process: {peak_mib:.0f} MiB of memory")
    print(f"\nthe model, for transformers: {root / 'hf'}\n"
          f"the report, for a browser:   {(root / 'report.html').resolve()}\n"
          f"retrieval, by a second model that learned needles alone: {root / 'retrieval.html'}\n"
          f"talk to it, here:            megatron-sov chat {root / 'hf'}\n"
          f"talk to it, in a browser:    megatron-sov serve {root / 'hf'}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", metavar="PATH",
                        help="a file or folder of your own text, instead of this machine's")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier demo and start anew")
    args = parser.parse_args()
    root = RUNS / (f"demo-{Path(args.corpus).stem}" if args.corpus else "demo")
    if args.fresh:
        shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    first = corpus_stage(root, args.corpus)
    times = [(first, run(first))]
    split_chats(root)
    sources = sources_of(root / "corpus")
    times += [(s, run(s)) for s in [
        *data_stages(root, sources), *training_stages(root, sources), *retrieval_stages(root, sources),
        *judging_stages(root)]]
    question = readable_question(root)
    print(f"\nof all answers of the last model, the one to {question!r} has most words that the corpus has; "
          "the report shows it first")
    times += [(s, run(s)) for s in report_stages(root, question)]
    summary(root, times)


if __name__ == "__main__":
    main()

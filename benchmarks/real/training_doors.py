"""Fine-tuning, adapters, preferences, RL and distillation, compared with transformers and PEFT."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from road import QUESTIONS, Outcome, Road, encode_question, find_number, load_reference, sets

REWARD = '''
class Listed:
    """1 for a response that holds a word of the prompt's list."""
    def score(self, row):
        return float(any(word in row["response"].lower() for word in row["answer"].split()))
'''
PLAIN_SETTINGS = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0",
                  "optim.beta2=0.999", "train.precision=fp32")
"""Settings of AdamW as torch and TRL have it by default, without weight decay."""
STEP_SETTINGS = (*PLAIN_SETTINGS, "train.steps=2")
"""Two steps whose losses a plain loop of torch repeats."""
BY_HAND = "transformers and torch's AdamW"
CHATS = [{"messages": [{"role": "user", "content": f"Order: {n} {item} for {name}."},
                       {"role": "assistant", "content": f'{{"name": "{name}", "{item}": {n}}}'}]}
         for n, item, name in ((2, "apples", "Ada"), (5, "pens", "Bo"), (1, "lamp", "Chen"),
                               (7, "cups", "Dan"), (3, "books", "Eun"), (4, "keys", "Finn"))]


def pack(road: Road, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    road.write_rows(f"{name}.jsonl", rows)
    road.once("tokenizer", "import", "my-model", "--output", "tokenizer", program="tokenizer.cli")
    road.once(name, "pack", "--tokenizer", "tokenizer", "--format", kind, "--input", f"{name}.jsonl",
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


def train_two_steps(model: Any, loss: Callable[[], torch.Tensor], lr: float) -> list[float]:
    """Return the loss before and after a step of AdamW with the gradient norm clipped to 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    result = loss()
    result.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    adam.step()
    with torch.no_grad():
        return [result.item(), loss().item()]


def read_events(road: Road, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in road.read_rows(f"{run}/events.jsonl") if event["event"] == kind]


def read_losses(road: Road, run: str) -> list[float]:
    return [event["loss"] for event in read_events(road, run, "step")]


def compare_losses(road: Road, run: str, expected: list[float], who: str, limit: float) -> Outcome:
    ours = read_losses(road, run)
    close = len(ours) == len(expected) and max(map(abs, map(float.__sub__, ours, expected))) < limit
    return ", ".join(f"{x:.6f}" for x in ours), f"{who}: " + ", ".join(f"{x:.6f}" for x in expected), close


def fine_tune(road: Road) -> Outcome:
    pack(road, "chats", "chat", CHATS)
    road.once("runs/sft", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/sft", *sets(
        *STEP_SETTINGS, "optim.lr=2e-5", "data.phases.0.seq_len=512", "train.global_batch_size=1"))
    model, tokenizer = load_reference(road.model)
    pairs = [encode_pair(tokenizer, chat["messages"]) for chat in CHATS]

    def loss() -> torch.Tensor:
        found = [answer_log_prob(model, ids, num_prompt) for ids, num_prompt in pairs]
        return -torch.cat(found).mean()

    return compare_losses(road, "runs/sft", train_two_steps(model, loss, 2e-5), BY_HAND, 2e-4)


def train_adapter(road: Road) -> Outcome:
    """An adapter, merged and exported: the exported folder is the model that PEFT makes of the adapter."""
    pack(road, "chats", "chat", CHATS)
    road.once("runs/lora", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/lora", *sets(
        *STEP_SETTINGS, "optim.lr=2e-4", "data.phases.0.seq_len=512", "train.global_batch_size=1",
        "lora.rank=16"))
    road.once("adapter", "convert", "to-peft", "runs/lora", "adapter")
    road.once("merged", "convert", "to-hf", "runs/lora", "merged", "--dtype", "float32")
    from peft import PeftModel

    ids = torch.tensor([encode_question(road.reference()[1], QUESTIONS[0])])
    base = load_reference(road.model)[0]
    with torch.no_grad():
        before = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(road.work / "adapter"))(ids).logits
        merged = load_reference(road.work / "merged")[0](ids).logits
    gap, effect = float((merged - theirs).abs().max()), float((theirs - before).abs().max())
    output = road.run("convert", "verify", "runs/lora", "merged")
    verdict = next((line for line in output.splitlines() if line.startswith("verified")), "no verdict")
    losses = ", ".join(f"{loss:.6f}" for loss in read_losses(road, "runs/lora"))
    return (f"losses {losses}; merged folder {gap:.1e} from PEFT, adapter moves logits by {effect:.2f}; "
            f"verify: {verdict[:100]}", "PEFT applies the adapter in float32",
            gap < 1e-3 and effect > 10 * gap)


PAIRS = [{"prompt": question, "chosen": "Yes.", "rejected": "I am not sure about that, let me think."}
         for question in QUESTIONS[:6]]


def prefer_pairs(road: Road) -> Outcome:
    pack(road, "pairs", "preference", PAIRS)
    road.once("runs/dpo", "prefer", "--from", "my-model", "--data", "pairs", "--run", "runs/dpo", *sets(
        *STEP_SETTINGS, "optim.lr=5e-6", "train.global_batch_size=6", "train.micro_batch_size=6",
        "data.phases.0.seq_len=128"))
    model, tokenizer = load_reference(road.model)
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

    return compare_losses(road, "runs/dpo", train_two_steps(model, loss, 5e-6), BY_HAND, 2e-4)


def reinforce(road: Road) -> Outcome:
    """One round; transformers repeats the log-probabilities, and plain Python the rewards."""
    words = ["apple", "river", "stone", "cloud", "piano", "tiger"]
    rows = [{"prompt": f"Say one word of this list and nothing else: {', '.join(words[i:] + words[:i])}.",
             "answer": " ".join(words)} for i in range(4)]
    road.write_rows("prompts.jsonl", rows)
    (road.work / "word_reward.py").write_text(REWARD)
    # no length of rows: it follows from the prompts and the limits
    road.once("runs/rl", "rl", "run", "--from", "my-model", "--prompts", "prompts.jsonl", "--reward",
              "word_reward.py:Listed", "--store", "store", "--run", "runs/rl", *sets(
                  "policy.method=grpo", "rollout.rounds=2", "rollout.prompts_per_round=4",
                  "rollout.samples_per_prompt=8", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=12",
                  "train.global_batch_size=32", "optim.lr=1e-5", "optim.warmup_steps=0",
                  "train.precision=fp32"))
    rewards = ", ".join(f"{event['means']['reward']:.3f}" for event in read_events(road, "runs/rl", "round"))
    model, _ = road.reference()
    gaps = []
    for row in read_rollouts(road.work / "store", "round-0001"):
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


def distill_on_policy(road: Road) -> Outcome:
    """Distill the folder into itself, with its fine-tuned model as teacher: both have one tokenizer."""
    fine_tune(road)
    road.once("runs/opd", "rl", "run", "--from", "my-model", "--teacher", "runs/sft", "--prompts",
              "prompts.jsonl", "--reward", "none", "--store", "opd-store", "--run", "runs/opd", *sets(
                  "policy.method=opd", "rollout.rounds=1", "rollout.prompts_per_round=4",
                  "rollout.samples_per_prompt=2", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=12",
                  "train.global_batch_size=8", "optim.lr=1e-5", "optim.warmup_steps=0"))
    kl = find_number(read_events(road, "runs/opd", "round"), "reverse_kl")
    is_known = kl is not None and kl > 0
    return f"one round, reverse KL {kl} nats a token", "the command ends with 0", is_known

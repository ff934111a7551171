"""Fine-tuning, adapters, preferences, RL and distillation, compared with transformers and PEFT."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from session import QUESTIONS, Outcome, Session, encode_question, find_number, load_reference

REWARD = '''
class Listed:
    """1 for a response with a word of the prompt's list."""
    def score(self, row):
        return float(any(word in row["response"].lower() for word in row["answer"].split()))
'''
PLAIN_SETTINGS = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0",
                  "optim.beta2=0.999", "train.precision=fp32")
"""AdamW with the defaults of torch and TRL, without weight decay."""
STEP_SETTINGS = (*PLAIN_SETTINGS, "train.steps=2")
"""Two steps, which `train_two_steps` repeats with transformers and torch."""
ROUND_SETTINGS = ("rollout.prompts_per_round=4", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=12",
                  "optim.lr=1e-5", "optim.warmup_steps=0")
CHAT_SETTINGS = (*STEP_SETTINGS, "data.phases.0.seq_len=512", "train.global_batch_size=1")
CHATS = [{"messages": [{"role": "user", "content": f"Order: {n} {item} for {name}."},
                       {"role": "assistant", "content": f'{{"name": "{name}", "{item}": {n}}}'}]}
         for n, item, name in ((2, "apples", "Ada"), (5, "pens", "Bo"), (1, "lamp", "Chen"),
                               (7, "cups", "Dan"), (3, "books", "Eun"), (4, "keys", "Finn"))]


def pack(session: Session, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    session.write_rows(f"{name}.jsonl", rows)
    session.run_once("tokenizer", "import", "my-model", "--output", "tokenizer", program="tokenizer.cli")
    session.run_once(name, "pack", "--tokenizer", "tokenizer", "--format", kind, "--input", f"{name}.jsonl",
                     "--heldout", "0", "--output", name, program="data_prep.cli")


def encode_pair(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the ids of a conversation up to the end mark of its answer, and the length of its prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    last = max(i for i, token in enumerate(whole) if token == end)
    return list(whole[:last + 1]), len(prompt["input_ids"])


def compute_logprobs(model: Any, ids: list[int], num_prompt: int) -> torch.Tensor:
    """Return the log-probability of each token of the answer, which begins after `num_prompt` tokens."""
    rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[num_prompt - 1:, 0]


def train_two_steps(model: Any, loss: Callable[[], torch.Tensor], lr: float) -> list[float]:
    """Return the loss before and after a step of AdamW with the gradient norm clipped to 1."""
    weights = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    result = loss()
    result.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    adam.step()
    with torch.no_grad():
        return [result.item(), loss().item()]


def read_events(session: Session, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in session.read_rows(f"{run}/events.jsonl") if event["event"] == kind]


def read_losses(session: Session, run: str) -> list[float]:
    return [event["loss"] for event in read_events(session, run, "step")]


def format_losses(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)


def compare_losses(session: Session, run: str, expected: list[float]) -> Outcome:
    ours = read_losses(session, run)
    close = len(ours) == len(expected) and all(
        abs(loss - reference) < 2e-4 for loss, reference in zip(ours, expected, strict=True))
    return format_losses(ours), f"transformers and torch's AdamW: {format_losses(expected)}", close


def fine_tune(session: Session) -> Outcome:
    pack(session, "chats", "chat", CHATS)
    session.run_once("runs/sft", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/sft",
                     settings=(*CHAT_SETTINGS, "optim.lr=2e-5"))
    model, tokenizer = load_reference(session.model)
    pairs = [encode_pair(tokenizer, chat["messages"]) for chat in CHATS]

    def loss() -> torch.Tensor:
        logprobs = [compute_logprobs(model, ids, num_prompt) for ids, num_prompt in pairs]
        return -torch.cat(logprobs).mean()

    return compare_losses(session, "runs/sft", train_two_steps(model, loss, 2e-5))


def train_adapter(session: Session) -> Outcome:
    """Compare an adapter that is merged and exported with the same adapter in PEFT."""
    pack(session, "chats", "chat", CHATS)
    session.run_once("runs/lora", "sft", "--from", "my-model", "--data", "chats", "--run", "runs/lora",
                     settings=(*CHAT_SETTINGS, "optim.lr=2e-4", "lora.rank=16"))
    session.run_once("adapter", "convert", "to-peft", "runs/lora", "adapter")
    session.run_once("merged", "convert", "to-hf", "runs/lora", "merged", "--dtype", "float32")
    from peft import PeftModel

    ids = torch.tensor([encode_question(session.reference()[1], QUESTIONS[0])])
    base = load_reference(session.model)[0]
    with torch.no_grad():
        before = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(session.folder / "adapter"))(ids).logits
        merged = load_reference(session.folder / "merged")[0](ids).logits
    gap, effect = float((merged - theirs).abs().max()), float((theirs - before).abs().max())
    verdict = session.verify_export("runs/lora", "merged")
    losses = format_losses(read_losses(session, "runs/lora"))
    return (f"losses {losses}; merged folder {gap:.1e} from PEFT, adapter moves logits by {effect:.2f}; "
            f"verify: {verdict[:100]}", "PEFT applies the adapter in float32",
            gap < 1e-3 and effect > 10 * gap)


PAIRS = [{"prompt": question, "chosen": "Yes.", "rejected": "I am not sure about that, let me think."}
         for question in QUESTIONS[:6]]


def train_on_pairs(session: Session) -> Outcome:
    pack(session, "pairs", "preference", PAIRS)
    session.run_once("runs/dpo", "prefer", "--from", "my-model", "--data", "pairs", "--run", "runs/dpo",
                     settings=(*STEP_SETTINGS, "optim.lr=5e-6", "train.global_batch_size=6",
                               "train.micro_batch_size=6", "data.phases.0.seq_len=128"))
    model, tokenizer = load_reference(session.model)
    sides = [[encode_pair(tokenizer, [{"role": "user", "content": pair["prompt"]},
                                      {"role": "assistant", "content": pair[side]}])
              for side in ("chosen", "rejected")] for pair in PAIRS]

    def compute_margins() -> torch.Tensor:
        return torch.stack([compute_logprobs(model, *good).sum() - compute_logprobs(model, *bad).sum()
                            for good, bad in sides])

    with torch.no_grad():
        start = compute_margins()

    def loss() -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (compute_margins() - start)).mean()

    return compare_losses(session, "runs/dpo", train_two_steps(model, loss, 5e-6))


def reinforce(session: Session) -> Outcome:
    """Run GRPO, and recompute the log-probabilities of the first round with transformers."""
    words = ["apple", "river", "stone", "cloud", "piano", "tiger"]
    rows = [{"prompt": f"Say one word of this list and nothing else: {', '.join(words[i:] + words[:i])}.",
             "answer": " ".join(words)} for i in range(4)]
    session.write_rows("prompts.jsonl", rows)
    (session.folder / "word_reward.py").write_text(REWARD)
    # no length of rows: it follows from the prompts and the limits
    session.run_once("runs/rl", "rl", "run", "--from", "my-model", "--prompts", "prompts.jsonl", "--reward",
                     "word_reward.py:Listed", "--store", "store", "--run", "runs/rl", settings=(
                         *ROUND_SETTINGS, "policy.method=grpo", "rollout.rounds=2", "train.precision=fp32",
                         "rollout.samples_per_prompt=8", "train.global_batch_size=32"))
    rounds = read_events(session, "runs/rl", "round")
    rewards = ", ".join(f"{event['means']['reward']:.3f}" for event in rounds)
    model, _ = session.reference()
    gaps = []
    for row in read_rollouts(session.folder / "store", "round-0001"):
        with torch.no_grad():
            expected = compute_logprobs(model, [*row["prompt_tokens"], *row["tokens"]],
                                        len(row["prompt_tokens"]))
        gaps.append(float((expected - torch.tensor(row["logprobs"])).abs().max()))
    return (f"reward of rounds {rewards}; log-probabilities of {len(gaps)} responses within "
            f"{max(gaps):.1e} nats", "transformers, float32", max(gaps) < 1e-3)


def read_rollouts(store: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = sorted((store / "rollouts").glob(f"{name}*/**/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def distill_on_policy(session: Session) -> Outcome:
    """Distill the fine-tuned model into the original, which has the same tokenizer."""
    fine_tune(session)
    session.run_once("runs/opd", "rl", "run", "--from", "my-model", "--teacher", "runs/sft", "--prompts",
                     "prompts.jsonl", "--reward", "none", "--store", "opd-store", "--run", "runs/opd",
                     settings=(*ROUND_SETTINGS, "policy.method=opd", "rollout.rounds=1",
                               "rollout.samples_per_prompt=2", "train.global_batch_size=8"))
    kl = find_number(read_events(session, "runs/opd", "round"), "reverse_kl")
    is_known = kl is not None and kl > 0
    return f"one round, reverse KL {kl} nats a token", "the command ends with 0", is_known

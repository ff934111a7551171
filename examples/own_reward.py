# What: a reward function in TRL's form: over completions and the fields of the rows. `rl` accepts it, too.
# Run:  megatron-sov score --reward examples/own_reward.py:brevity --input rows.jsonl --output scores.jsonl
# See:  a reward for each row in scores.jsonl: 1 for a right answer, minus 0.1 for each word beyond ten.

MAX_WORDS = 10


def brevity(completions, answer, **kwargs):
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        excess_words = max(0, len(completion.split()) - MAX_WORDS)
        rewards.append(float(str(right) in completion) - 0.1 * excess_words)
    return rewards

# What: a reward as TRL writes it: a function over completions and the fields of the rows. It works in rl too.
# Run:  megatron-sov score --reward examples/own_reward.py:brevity --input rows.jsonl --output scores.jsonl
# See:  scores.jsonl has a reward for each row: 1 for a right answer, less for each word beyond ten.

MOST_WORDS = 10


def brevity(completions, answer, **kwargs):
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        too_many = max(0, len(completion.split()) - MOST_WORDS)
        rewards.append(float(str(right) in completion) - 0.1 * too_many)
    return rewards

# What: a step that changes rows of text, or drops them, before they are packed.
# Run:  megatron-sov map corpus.jsonl examples/own_data_step.py:WithoutMenus --output cleaned
# See:  the rows that are left, in cleaned/rows.jsonl.

FEWEST_WORDS = 5


class WithoutMenus:
    def do(self, row):
        lines = [line for line in row["text"].splitlines() if "|" not in line]
        text = "\n".join(lines)
        return {**row, "text": text} if len(text.split()) >= FEWEST_WORDS else None

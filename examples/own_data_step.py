# What: a data step that changes or drops rows of text before packing.
# Run:  megatron-sov map corpus.jsonl examples/own_data_step.py:WithoutMenus --output cleaned
# See:  the remaining rows in cleaned/rows.jsonl.

MIN_WORDS = 5


class WithoutMenus:
    def do(self, row):
        lines = [line for line in row["text"].splitlines() if "|" not in line]
        text = "\n".join(lines)
        return {**row, "text": text} if len(text.split()) >= MIN_WORDS else None

"""Data that models write: generators that check what they get, in a run that can be killed and continued."""

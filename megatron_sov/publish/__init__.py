"""What others read of a run: reports, cards, ladders of small models."""

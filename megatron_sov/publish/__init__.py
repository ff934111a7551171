"""What others read of a run: reports."""

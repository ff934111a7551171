"""What others read of a run: reports and cards."""

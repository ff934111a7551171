"""Token shards: packed, mixed, adopted, looked at, verified."""

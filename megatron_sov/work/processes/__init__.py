"""Processes that are started, limited, answered and ended: children, workers, pools, commands."""

"""One stage of training from its settings to its end: begun, planned, restored, judged."""

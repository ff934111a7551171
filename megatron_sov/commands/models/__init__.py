"""Commands that convert, run or serve a model, and list recipes."""

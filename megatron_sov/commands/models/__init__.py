"""Commands that turn a model into something else: a folder, a text, an address, a card."""

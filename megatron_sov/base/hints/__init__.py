"""Answers to commands, options and settings that do not exist: words of other programs, and removed parts."""

"""Corrections of command lines: options and commands of other programs, removed options, faulty paths."""

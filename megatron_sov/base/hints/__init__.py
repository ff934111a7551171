"""Corrections of command lines: options and commands of other programs, removed options, faulty paths.

A typed word may be no path at all (a JSON text, a long prompt): `os.path.exists` returns False for it where
`Path.exists` raises OSError.
"""

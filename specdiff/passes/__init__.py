"""The passes: from one traced graph to the programs that replace it.

In the order of `specdiff.pipeline`: `normalize` (one form), `plan` (what each step computes),
`emit` (programs of the plan), `share` (repeated blocks compiled once). `rules` are the facts per
ATen operator and `graph` writes and prints graphs; all use both. `base` runs a pass.
"""

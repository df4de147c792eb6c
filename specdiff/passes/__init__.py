"""The passes: from one traced graph to the programs that replace it.

In the order of `specdiff.pipeline`: `normalize` brings a graph into one form, `select` decides what
a selective step computes, `emit` writes the programs, `share` compiles repeated blocks once. All
of them use `rules` (facts per ATen operator) and `graph` (writing and printing graphs); `base` runs
a pass.
"""

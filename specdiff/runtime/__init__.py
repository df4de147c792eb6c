"""The runtime: decides for every evaluation of a compiled graph which of its programs runs.

`api` is what a user calls. `step` answers one evaluation, for a trajectory of `streams`, with what
`tokens` to compute and what the `sampler` is seen to do; `blocks` do so for a model compiled block
by block; `records` tell of it.
"""

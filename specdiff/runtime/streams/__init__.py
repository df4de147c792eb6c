"""Trajectories: `registry` (of models and sessions), `streams` with their `keys`, and `progress`.

Each stream leases its `caches`, among them the rows of `time_tables`.
"""

"""Measuring on this machine: methods against each other, the rates of the machine, peak memory.

`methods` are those of the demo, `comparison` runs them in turn, `summary` tells the figures;
`machine` measures the rates that bound any program, `memory` the most that was held.
"""

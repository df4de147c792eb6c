"""The compiler, one pass per file, in the order of `specdiff.analysis`.

normalize, axes, selective, timetable, invariant, quantize, regions; then `lower` has `emit` and
`rows` write the programs.
"""

"""What a selective step computes, caches and skips: decisions alone, no programs yet.

`axes` finds the tokens, `output` and `input_roles` what goes in and out. `select` makes the
`Selection` (`block` that of a single block); `timetable`, `invariant` and `quantize` refine it.
`cache_layout` and `signature` say what the runtime must know; `regions`, `residuals` and `cost`
serve the report.
"""

"""What a selective step computes, keeps and skips: facts and decisions, no programs yet.

`axes` (where the tokens are), `output`, `input_roles`; `selective` (the plan), or `block` of one
block; `timetable` and `invariant` and `quantize` refine it; `cache_layout`, `signature` (what the
runtime is told); `regions`, with `residuals` and `cost` (for the report).
"""

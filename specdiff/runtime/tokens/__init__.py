"""Which tokens a step computes, and what stands for the others.

`schedule` (how many), `importance` (which), `history` (what they were), `forecast` and `correction`
(what they would be).
"""

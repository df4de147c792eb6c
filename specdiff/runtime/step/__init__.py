"""One evaluation: `dispatch` finds its `call` and `step` answers it.

`shapes` picks the graph, `fallbacks` says when it runs dense, `corrector`, `lookahead` and
`speculation` are what a step may add.
"""

"""Tools for fx graphs.

`writer` builds one, `python_file` prints one, `dump` writes the graph after each pass to a folder,
`dependence` and `in_place` answer questions about one.
"""

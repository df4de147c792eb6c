"""Writing the programs of a graph.

`whole` computes every token, `rows` the active ones, `without_text` the active ones and no text.
`importance` adds the measuring of importance; `lower` hands each program to the inner compiler.
"""

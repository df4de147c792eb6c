"""Programs of a plan: `whole` (every token), `rows` (the active ones), `without_text`.

`importance` adds the scores of tokens; `lower` hands each program to the inner compiler.
"""

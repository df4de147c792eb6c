"""`specdiff eval`: every method on the same trained pipeline, measured on equal terms.

`subject` is the pipeline, `candidates` and `peers` are the methods, `features` and `measures` say
how far a picture is from the dense one, `measuring` runs one method, `campaign` runs them all and
`findings` keeps what was found; `table` and `plot` show it.

`gate` is `specdiff verify`: may this pipeline go live under this plan?
"""

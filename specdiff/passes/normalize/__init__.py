"""Bringing a Dynamo graph into one form.

`specialise` fixes its sizes; `normalize` makes it functional ATen, with `fuse_attention` and, for
both, `rewrite`.
"""

"""What a rewritten model must agree with.

`checks` has the equalities that any correct rewriting keeps; `verification` holds a user's model to
them (`specdiff.verify`).
"""

"""The small trained models that demos and evaluations run.

`demo` is the text-to-image model whose weights ship in `data`; `textures` and `photos` are two
more, whose weights are given by path. `picture_model` holds a pipeline of the user's, too.
"""

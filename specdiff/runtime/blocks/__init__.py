"""Models compiled block by block: `attach` hooks the root and `block` runs each of them.

`patchify` cuts the latent into tokens; `root_programs` are what the root runs.
"""

"""What the sampler does between two evaluations, as seen from the latent alone.

`timeline` (times to come), `noise` (known processes), `observation` (what is read from the device),
`sampler_fit` (how the latent moved), `guidance_pair` (the same by two streams).
"""

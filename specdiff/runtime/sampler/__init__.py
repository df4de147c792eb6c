"""What the sampler does between two evaluations, as seen from the latent alone.

`timeline` (times to come), `noise` (known processes), `observation` (what is read from the device),
`displacement` (how the latent moved), `guidance_pair` (the same by two streams), `sampler_fit`
(what that says of the sampler), `known_step` and `remains` (what it leaves unexplained). Of a
scheduler at hand: `scheduler`, `weights`, `fresh` (the noise that it draws).
"""

"""Ways into programs that run diffusion models, each in a file of its own."""

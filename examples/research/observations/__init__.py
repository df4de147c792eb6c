"""What `examples/research/observations.py` records, computes and draws."""

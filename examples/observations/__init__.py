"""What `examples/observations.py` records, computes and draws."""

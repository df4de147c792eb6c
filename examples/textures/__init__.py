"""Data and configuration for `examples/train_sd3.py`."""

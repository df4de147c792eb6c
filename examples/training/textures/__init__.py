"""Data and configuration for `examples/training/train_sd3.py`."""

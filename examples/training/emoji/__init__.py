"""Data preparation and pictures for `examples/training/train_emoji.py`."""

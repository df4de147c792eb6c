"""Data preparation and pictures for `examples/train_emoji.py`."""

"""Tuning: `search` looks for the plan, `trials` draw by plans, `tuner` is `specdiff.tune`."""

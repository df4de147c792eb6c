"""What is told of a run: `stats` counts, `recording` keeps one record per step."""

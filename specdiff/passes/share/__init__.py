"""Blocks that repeat: `repeats` finds them, `outline` has each compiled once."""

"""The data of emoji that move."""

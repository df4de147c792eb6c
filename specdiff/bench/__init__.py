"""Speed on random weights: models of known sizes, their sampling loops, times and floors."""

"""The training loop that train.py calls."""

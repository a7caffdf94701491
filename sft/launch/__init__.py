"""The processes of a run: start, signals, lost ranks."""

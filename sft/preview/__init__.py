"""A run shown before it starts: dry run, memory, measured steps."""

"""Examples to rows to batches."""

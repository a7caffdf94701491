"""Files that a run leaves to read: run.json, the run page, the model card."""

"""Save, verify, resume and consolidate checkpoints."""

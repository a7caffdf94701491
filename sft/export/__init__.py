"""Merged weights, GGUF and Modelfile of a checkpoint."""

"""The chat page: request filter and models behind a server."""

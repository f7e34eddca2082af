"""Adapters on disk: storage, names, dialects and metadata. Nothing here knows a module, only sites."""

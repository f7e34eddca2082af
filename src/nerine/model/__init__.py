"""Adapters at work in a model: which layers, how they are attached, and the handle that commands them."""

"""`nerine ui`: the tools in a browser on this machine. A server that binds to 127.0.0.1 alone, shows pages made with
Gradio, reads and writes in the folders that it was given and nowhere else, and asks for a token.

`serve` is all that the command needs; importing this package imports neither Gradio nor torch.
"""

from __future__ import annotations

from nerine.ui.server import Settings, serve

__all__ = ["Settings", "serve"]

"""The command `hf-layerprobe`: what the library does, for the terminal."""

from .app import app, main

__all__ = ["app", "main"]

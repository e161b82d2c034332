"""The one place that turns exceptions into a message and an exit code; bugs keep their traceback."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..errors import LayerProbeError, VerificationError

FAILED_CHECK, UNUSABLE_INPUT = 1, 2


class GuardedGroup(TyperGroup):
    """A group of commands whose foreseeable failures end in one line on stderr."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except VerificationError as error:
            code, message = FAILED_CHECK, error
        except (LayerProbeError, OSError) as error:
            code, message = UNUSABLE_INPUT, error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # safetensors is not imported for --help
                raise
            code, message = UNUSABLE_INPUT, f"A safetensors file cannot be read or written: {error}"
        Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(message)), soft_wrap=True)
        raise typer.Exit(code)

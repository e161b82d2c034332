"""Registers `optimum-cli layerprobe`. The folder belongs to the namespace package that optimum looks for commands in."""

from hf_layerprobe.cli.optimum import LayerProbeCommand

REGISTER_COMMANDS = [LayerProbeCommand]

"""Registers `optimum-cli layerprobe`: the wheel has this file in the namespace package where optimum looks for commands."""

from hf_layerprobe.cli.optimum import LayerProbeCommand

REGISTER_COMMANDS = [LayerProbeCommand]

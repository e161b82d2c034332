"""`optimum-cli layerprobe …`: the same commands under optimum's."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .app import app


class LayerProbeCommand(BaseOptimumCLICommand):
    """Hands its arguments to `hf-layerprobe`."""

    COMMAND = CommandInfo(
        name="layerprobe", help="Score the layers of a model by DOCS and AVSS, and prune them (hf-layerprobe)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "arguments", nargs=REMAINDER, help="A command of hf-layerprobe and its arguments; none lists them."
        )

    def run(self) -> None:
        app(args=self.args.arguments, prog_name="optimum-cli layerprobe")

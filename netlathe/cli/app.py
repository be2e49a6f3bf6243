"""The commands, one file each, gathered under ``netlathe``."""

from __future__ import annotations

import click

import netlathe
from netlathe.cli.bench import bench
from netlathe.cli.bisect import bisect
from netlathe.cli.cache import cache
from netlathe.cli.compile import compile_
from netlathe.cli.diff import diff
from netlathe.cli.inspect import inspect
from netlathe.cli.passes import passes
from netlathe.cli.plan import plan
from netlathe.cli.targets import targets
from netlathe.cli.verify import verify


class InOrder(click.Group):
    """A group that lists its commands in the order a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in order of registration."""
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(netlathe.__version__, prog_name="netlathe")
def app() -> None:
    """Make a neural network smaller, one checked pass at a time.

    \b
    netlathe inspect MODEL                         what is in it
    netlathe passes                                what can be done to it
    netlathe plan MODEL --passes "..."             what would be done, touching nothing
    netlathe compile MODEL --passes "..." -o DIR   do it, check every step, write the result
    netlathe bench MODEL DIR                       what that gained
    netlathe bisect MODEL --passes "..."           which layers cost most quality

    MODEL is an ONNX file, a .pt2 file that torch.export.save wrote (torch unpickles parts of it: only
    one that you trust), a local Hugging Face directory (config.json and safetensors), or a folder that
    `netlathe compile` wrote.

    \b
    Exit codes: 0 done, 1 a gate failed, 2 bad input or usage, 70 a defect of NetLathe, 130 Ctrl-C.
    """


for command in (compile_, plan, inspect, verify, diff, bench, bisect, passes, targets, cache):
    app.add_command(command)

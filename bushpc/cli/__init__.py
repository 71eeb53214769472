"""The command line: one file per command group. `bushpc --help` lists the commands.

Every module here that has a `GROUP` adds its commands, so a new command is one new file (or one entry in a group's
file). Nothing is imported for a command before it runs: help, status, report and audit start without torch.
"""

from bushpc.cli.app import main

__all__ = ["main"]

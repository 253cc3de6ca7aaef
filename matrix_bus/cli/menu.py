"""Which commands there are, and the module of each: it is imported when its command is called, none for `--help`."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

_COMMANDS = {
    "run": ("submitting", "Everything in one command: broker, model, workers, output."),
    "submit": ("submitting", "Submit a dataset, wait for it and write its outcomes."),
    "worker": ("processes", "Serve roles of every active run until SIGTERM or Ctrl-C."),
    "collect": ("runs", "Write a run's outcomes to a file, or go on with one."),
    "status": ("runs", "Rows waiting, in flight and done; which roles nobody serves."),
    "runs": ("runs", "List the runs on the broker."),
    "pause": ("controls", "Hold a run up: workers start nothing more of it."),
    "resume": ("controls", "Let a paused run go on."),
    "set": ("controls", "Change the limits of a run that goes on."),
    "retry": ("controls", "Send the failed rows of a run again."),
    "cancel": ("controls", "End a run now."),
    "purge": ("controls", "Delete what a run has on the broker."),
    "dead": ("controls", "Messages that no worker could read."),
    "broker": ("processes", "Your local JetStream broker: start, stop, status."),
    "serve": ("serving", "Launch servers of a model, or announce one that runs."),
    "endpoints": ("serving", "List the model servers that are announced, and their load."),
    "plan": ("serving", "Estimate how long a run takes, from a sample."),
    "config": ("settings", "Show the settings of a run, and where each comes from."),
    "new": ("authoring", "Write a small workflow to start from, with a test."),
    "graph": ("authoring", "Draw a workflow: its roles and where each may send a row."),
}
"""By name, as in `--help`: the module, and what it does in a line."""


class Menu(TyperGroup):
    """The commands, found by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All of them, in order."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now; None if there is none of that name."""
        if cmd_name not in self.commands:
            from . import app

            known = cmd_name in _COMMANDS  # else all of them, since what is meant may be much like one
            for module in dict.fromkeys([_COMMANDS[cmd_name][0]] if known else [m for m, _ in _COMMANDS.values()]):
                importlib.import_module(f".{module}", __package__)
            made = typer.main.get_command(app)
            assert isinstance(made, TyperGroup)
            self.commands = made.commands
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list into the help text."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

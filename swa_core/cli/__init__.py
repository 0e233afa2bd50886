"""The command ``swa``: average checkpoints, plan a training, look into a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from swa_core.cli import average, inspect, plan
from swa_core.errors import SWAError

COMMANDS = {"average": average, "plan": plan, "inspect": inspect}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: what follows ``swa``; by default those of the process.

    Returns:
      The exit status: 0, or 1 after an error of this package or of a file, told on stderr. Wrong
      usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="swa", description="Weight averaging, from a terminal.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        first, _, rest = (module.__doc__ or "").partition("\n")
        module.add_arguments(
            commands.add_parser(
                name,
                help=first,
                description=first + rest,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command].run(options)
    except average.UsageError as error:
        parser.error(f"{options.command}: {error}")
    except (SWAError, OSError) as error:
        print(f"swa {options.command}: {error}", file=sys.stderr)
        return 1
    return 0

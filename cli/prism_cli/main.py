"""The command line: `prism …` and `kubectl prism …`.

Knows arguments, tables and exit codes; each command imports what it needs when it runs, so `prism
version` needs no torch and an image may carry only the extras of its part. The decision worth
arguing about: one entry point for all parts, because a user has one product.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Final, TypeVar

from prism.contract import ExitCode

_Given = TypeVar("_Given")

# command -> (module with add_arguments(parser) and run(arguments) -> int, help)
_COMMANDS: Final = {
    "refactor": ("prism_cli.refactor", "cut a checkpoint's experts into sub-experts"),
    "plan": ("prism_cli.plan", "say what refactoring a checkpoint would need"),
    "eval": ("prism_cli.evaluate", "measure the quality of an artifact at given levels"),
    "architectures": ("prism_cli.architectures", "list what can be refactored and served"),
    "inspect": ("prism_cli.inspect", "print what an artifact offers, and verify it"),
    "serve": ("prism_cli.serve", "serve an artifact behind the OpenAI API"),
    "version": ("prism_cli.version", "print the version"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see prism.contract.ExitCode)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] == "serve":  # its own parser: it belongs to the serving part
        return _run(_module("prism_cli.serve").run, given[1:])
    parser = _parser(given[0] if given else None)
    parsed = parser.parse_args(given)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return ExitCode.USAGE
    run: Callable[[argparse.Namespace], int] = parsed.run
    return _run(run, parsed)


def _run(run: Callable[[_Given], int], given: _Given) -> int:
    try:
        return run(given)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("prism"):
            raise
        print(
            f"prism: this command needs {error.name}, which is not installed; "
            "install the extra that carries it, for example moe-prism[refactor].",
            file=sys.stderr,
        )
        return ExitCode.USAGE


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Parser with all commands named and only the arguments of ``command`` loaded."""
    parser = argparse.ArgumentParser(
        prog="prism", description="Elastic serving of Mixture-of-Experts models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, (module_name, text) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == command:
            module = _module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())

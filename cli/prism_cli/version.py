"""`prism version`: one line, no heavy import."""

import argparse

from prism import __version__
from prism.contract import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print the distribution's version."""
    del arguments
    print(f"prism {__version__}")
    return ExitCode.OK

"""`prism serve`: hands its arguments to the serving part, which knows them."""

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments belong to prism_serving.app; nothing is parsed here."""


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop."""
    from prism_serving.app import main

    return int(main(list(arguments)) or 0)

"""`python -m prism_serving.engine`: the compute container of a serving pod.

The environment is set before anything imports torch; OpenMP reads it once.
"""

import sys

from prism_serving import logs
from prism_serving.engine.options import parse, prepare_environment


def main() -> int:
    """Exit code of the process."""
    options = parse()
    prepare_environment(options)
    logs.configure("engine")
    from prism_serving.engine.server import run  # imports torch

    return run(options)


if __name__ == "__main__":
    sys.exit(main())

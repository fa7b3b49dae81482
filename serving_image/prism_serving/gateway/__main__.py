"""`python -m prism_serving.gateway`: the front-door container of a serving pod."""

import sys

import uvloop

from prism_serving import logs
from prism_serving.gateway.options import parse
from prism_serving.gateway.server import run


def main() -> int:
    """Exit code of the process."""
    options = parse()
    logs.configure("gateway")
    return uvloop.run(run(options))


if __name__ == "__main__":
    sys.exit(main())

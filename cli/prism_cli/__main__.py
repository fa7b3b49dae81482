"""`python -m prism_cli`: the same as `prism`."""

import sys

from prism_cli.main import main

sys.exit(main())

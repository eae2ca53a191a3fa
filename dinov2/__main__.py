"""`python -m dinov2` is the `dinov2` command."""

import sys

from dinov2.cli import main

sys.exit(main())

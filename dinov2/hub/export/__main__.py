"""`python -m dinov2.hub.export`."""

import sys

from . import main

sys.exit(main())

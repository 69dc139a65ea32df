"""`python -m spatialid` is the command `spatialid`."""
import sys

from .rerun import main

sys.exit(main())

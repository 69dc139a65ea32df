"""`python -m spatialid` is the command `spatialid`."""
import sys

from .cli import main

sys.exit(main())

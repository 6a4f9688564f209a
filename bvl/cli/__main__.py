"""python -m bvl.cli VERB is bvl VERB."""

import sys

from bvl.cli import main

sys.exit(main())

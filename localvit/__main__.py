"""`python -m localvit` is the command line."""

import sys

from localvit.cli import main

sys.exit(main())

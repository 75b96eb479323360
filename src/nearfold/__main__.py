"""`python -m nearfold` is the command `nearfold`."""

import sys

from nearfold.cli import main

sys.exit(main())

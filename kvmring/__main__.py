"""Run the command as `python -m kvmring`."""

import sys

from kvmring.cli import main

sys.exit(main())

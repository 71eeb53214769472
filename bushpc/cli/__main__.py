"""`python -m bushpc.cli`, as launchers and the code snapshot in a run folder start it."""

import sys

from bushpc.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

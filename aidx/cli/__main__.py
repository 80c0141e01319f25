"""`python -m aidx.cli`: the command line where no script is installed."""

import sys

from aidx.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m koopmon` is `koopmon`."""

import sys

from koopmon.cli import main

if __name__ == "__main__":
    sys.exit(main())

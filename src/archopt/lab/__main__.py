"""`python -m archopt.lab` is `archopt`."""

import sys

from archopt.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())

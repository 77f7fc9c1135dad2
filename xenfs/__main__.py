"""python -m xenfs."""

import sys

from xenfs.cli import main

if __name__ == "__main__":
    sys.exit(main())

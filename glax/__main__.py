"""``python -m glax``."""

import sys

from glax.cli import main

if __name__ == "__main__":
    sys.exit(main())

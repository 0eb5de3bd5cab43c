"""`python -m softvq` is the same program as `softvq`."""

import sys

from softvq.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())

"""``python -m quant_compile``: the command line."""

import sys

from quant_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())

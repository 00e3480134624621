"""``python -m quant_compile``: the command line."""

from quant_compile.cli import main

if __name__ == "__main__":
    main()

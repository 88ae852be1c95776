"""Makes `python -m lora_adapters` run the console program `lora-adapters`."""

import sys

from lora_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main())

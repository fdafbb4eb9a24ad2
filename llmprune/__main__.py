"""`python -m llmprune`, and what launchers of several processes start: `accelerate launch -m llmprune ...`."""

import sys

from llmprune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Serves a model over an OpenAI-compatible API: ``python serve.py``, then ``python serve.py --help``."""

import sys

from nanodrift.server.cli import main

if __name__ == "__main__":
    sys.exit(main())

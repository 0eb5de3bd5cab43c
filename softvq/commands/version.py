"""The version: `softvq version`."""

import argparse
import sys

from softvq import __version__

__all__ = ["version"]


def version(arguments: argparse.Namespace) -> None:
    """Print the version without importing anything heavy."""
    sys.stdout.write(f"softvq {__version__}\n")

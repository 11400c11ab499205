"""The command line: `flashnorm inspect | fold | fold-adapter | verify | demo`."""

from flashnorm.cli.app import app, main

__all__ = ["app", "main"]

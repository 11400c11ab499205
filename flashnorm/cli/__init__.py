"""The command line: `flashnorm inspect | fold | verify | demo`."""

from flashnorm.cli.app import app, main

__all__ = ["app", "main"]

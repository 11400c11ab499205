"""The command line: `flashnorm`, whose commands are in app.py."""

from flashnorm.cli.app import app, main

__all__ = ["app", "main"]

"""The command line: `flashnorm`, whose commands are in app.py."""

from flashnorm.cli import doctor
from flashnorm.cli.app import app, main

doctor.register(app)

__all__ = ["app", "main"]

"""`python -m flashnorm` is the command `flashnorm`; it says what to install where it cannot run."""

import sys

from flashnorm.errors import FlashNormError
from flashnorm.extras import need


def main() -> None:
    """The entry point of the console script."""
    try:
        need("the command line", "rich", "typer")
    except FlashNormError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from flashnorm.cli import main as commands

    commands()


if __name__ == "__main__":
    main()

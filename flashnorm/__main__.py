"""`python -m flashnorm` is the command `flashnorm`."""

from flashnorm.cli import main

if __name__ == "__main__":
    main()

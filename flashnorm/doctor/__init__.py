"""What flashnorm finds on this machine, what is missing, and how to get it. Nothing is written."""

from flashnorm.doctor.checks import Row, State, examine

__all__ = ["Row", "State", "examine"]

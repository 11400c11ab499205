"""Proof: `verify` measures whether a rewritten model computes what the original computes."""

from flashnorm.verification.precision import float64_truth
from flashnorm.verification.report import Report
from flashnorm.verification.run import verify

__all__ = ["Report", "float64_truth", "verify"]

"""Proof: `verify` measures whether a rewritten model computes what the original computes, and
`verify_weights` compares a folded checkpoint with what the plan makes of the original."""

from flashnorm.verification.precision import float64_truth
from flashnorm.verification.report import Report
from flashnorm.verification.run import verify
from flashnorm.verification.weights import verify_weights
from flashnorm.verification.weights_report import WeightsReport

__all__ = ["Report", "WeightsReport", "float64_truth", "verify", "verify_weights"]

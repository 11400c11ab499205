"""Folds on a Ray cluster and with a server of S3 on this machine: `make cluster`."""

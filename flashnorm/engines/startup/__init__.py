"""The directory that `flashnorm run` puts before all others on PYTHONPATH."""

"""A zoo of models beyond transformers, and failures injected into what is done to them.

Runs in an environment of its own (`make field-env`); a library that is not installed is a row.
"""

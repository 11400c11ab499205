"""The kernels for GPUs: in Triton's interpreter, compiled without a device, and on one if there is.

Whether a process interprets kernels is settled when it imports triton, so the checks (`check_*.py`)
run in processes of their own: `test_checks.py` starts them, and nothing else collects them.
"""

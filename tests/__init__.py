"""Every test, and what runs as `python -m tests.…`, raises what users see as a refusal by a bug."""

import os

os.environ.setdefault("FLASHNORM_RAISE_BUGS", "1")
os.environ["FLASHNORM_CPU_CACHE"] = "off"  # what is shipped is tested, not what a machine measured

"""What a longer run would say besides, by the options that ask for it."""

from __future__ import annotations

from flashnorm.bench.engines.children import KINDS
from flashnorm.bench.records import VARIANTS, Settings

ROUNDS = 7
CONTEXTS = "64,2000,8000"
PREFILL = "1,2,4,8,16,32,64,128,256,512,2048"


def further(settings: Settings) -> str:
    """One line for each thing that was not asked for."""
    left = [name for name in VARIANTS if name not in settings.variants]
    engines = {each.partition("=")[0] for each in settings.engines}
    others = [name for name in KINDS if name not in engines]
    lines = [
        (settings.rounds < ROUNDS, f"--rounds {ROUNDS}", "steadier medians"),
        (len(settings.dtypes) == 1, "--dtype bf16 --dtype fp32", "several dtypes"),
        (len(settings.contexts) == 1, f"--context {CONTEXTS}", "decoding after long prompts"),
        (len(settings.prefill) < 5, f"--prefill {PREFILL}", "where prefills win and lose"),
        (not settings.memory, "--memory", "memory, in processes of their own"),
        (bool(left), f"--variants {','.join(VARIANTS)}", "what is compiled: minutes of compiling"),
        (bool(others), f"--engines {','.join(others)}", "other engines, where they are installed"),
    ]
    asked = [f"  {option}: {what}" for wanted, option, what in lines if wanted]
    return "\n".join(["A longer run adds:", *asked]) if asked else ""

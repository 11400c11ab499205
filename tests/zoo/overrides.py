"""What no rule can know: one line per configuration, each with its reason."""

OVERRIDES: dict[str, dict] = {}

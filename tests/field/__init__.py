"""What people do with models, and what has to come of it."""

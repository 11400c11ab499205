"""What people do with models, each kind of it once: nothing may be silently wrong."""

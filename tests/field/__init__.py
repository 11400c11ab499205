"""What people do with models, each kind as a test."""

"""What people do with models, and that it comes out right: found in reports, tried on ours."""

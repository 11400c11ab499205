"""Pages: what inspect, verify, bench and acceleration found, for a browser and for notebooks."""

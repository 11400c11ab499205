"""Other engines beside ours: each in a process, and where need be in an environment, of its own."""

"""How long a test waits for a process before it takes it to hang."""

PATIENCE = 3600  # seconds; no test depends on how fast the machine is

"""The commands, a file each: `add` declares its arguments, `run` does the work and returns the exit status."""

"""The command at the terminal."""

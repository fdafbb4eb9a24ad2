"""What a run leaves behind: its record, its model card, and what it shows while it works."""

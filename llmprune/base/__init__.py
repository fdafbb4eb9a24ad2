"""What all rooms stand on: errors, texts for people, files and folders, the machine, time, processes. Knows no model."""

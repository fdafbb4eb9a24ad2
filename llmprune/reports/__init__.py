"""Pages about runs: `llmprune report`, and the tables and plots of `llmprune compare`."""

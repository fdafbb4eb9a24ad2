"""Instruments: perplexity, lm-eval's tasks, timing; and the two verbs that only measure, evaluate and bench."""

"""Train what pruning left: masks stay, zeros stay zero."""

"""graphprune: a pruning compiler. A trained network in; a smaller, really faster one out, with proof that the cut was made correctly."""

"""Products: what is multiplied, how it is asked for, and who looks on."""

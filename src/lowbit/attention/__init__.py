"""Attention as seven products in the formats of a recipe: the definition, the native kernel, autograd."""

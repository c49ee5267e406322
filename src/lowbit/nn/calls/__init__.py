"""Products in functions of a model's modules, found while they run and converted like layers."""

"""The bits of a model over a run: the controller, which alone writes them, and CPT's precision range test."""

"""Number formats and what they do to tensors: the definition, in torch's own operators."""

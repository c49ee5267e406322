"""Conversion of models: rules, choice of engines, report, state, and the way back."""

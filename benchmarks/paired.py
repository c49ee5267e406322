"""Paired rounds, under the names that the scripts here use."""

from lowbit.machine import paired as seconds
from lowbit.machine import ratio

__all__ = ["ratio", "seconds"]

"""The experiment of Onal et al. (2024): every baseline, over seeds, on data in and out of distribution."""

from .run import reproduce
from .settings import Settings

__all__ = ["Settings", "reproduce"]

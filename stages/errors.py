"""What the user's data can have wrong."""

from __future__ import annotations


class DataError(ValueError):
    """Images that are not there, or not what they should be; the message is one line."""

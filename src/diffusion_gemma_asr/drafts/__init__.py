"""Searches for drafts with language models beside the backbone: what three small models bundled today need, and nothing
else.

`checkpoint/` imports it where a config.json asks for it; it goes when these models do.
"""

from .search import load_drafter, read_search_config

__all__ = ["load_drafter", "read_search_config"]

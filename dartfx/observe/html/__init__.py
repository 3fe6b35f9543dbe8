"""``report.html``: one graph's way through the passes, as a page that needs no network."""

from dartfx.observe.html.page import Page

__all__ = ["Page"]

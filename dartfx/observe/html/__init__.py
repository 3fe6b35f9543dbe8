"""``report.html``: one graph's way through the passes, as a page that needs no network."""

"""``report.html``: a graph after each pass, as a self-contained page."""

"""The operator's side: the API under /api, discovery, and the page."""

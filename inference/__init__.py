"""Models, training, releases and the ranking server."""

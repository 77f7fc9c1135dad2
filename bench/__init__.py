"""Side-by-side measurements against peers; nothing in the packages imports this folder."""

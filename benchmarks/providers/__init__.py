"""One module per family of peers; importing one registers what it provides."""

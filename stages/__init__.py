"""One module per stage; stages meet only on disk and never import each other."""

"""EasyControl: images under conditions whose keys and values are computed once (arXiv 2503.07027)."""

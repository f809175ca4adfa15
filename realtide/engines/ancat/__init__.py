"""ANCAT: streaming speech recognition that decides per frame and layer how far to look ahead."""

"""How bytes move: ranges of files and host buffers. Knows no tensor and no index."""

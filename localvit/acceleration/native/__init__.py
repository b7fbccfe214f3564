"""C++ kernels for the middle stage of a feed-forward network."""

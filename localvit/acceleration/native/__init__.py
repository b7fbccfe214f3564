"""C++ kernels for the middle stage of a feed-forward network: how they are built, when they apply, their
calls."""

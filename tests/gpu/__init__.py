"""The library on a GPU: every method through the executor, with kernels on, in half precision."""

"""The Triton kernels; imported as ``wgan_fast.kernels``."""

if __name__ != "wgan_fast.kernels":
    # Two module objects of one file would define every kernel twice, and a PyPI package is called `kernels`.
    raise ImportError("this folder is the package wgan_fast.kernels; import it by that name")

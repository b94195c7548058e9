"""Measured kernels: a few constants a kernel, GPU and precision, fitted to public tables, and stand-ins for the rest."""

from stepcal.kernels.constants import GpuKernels, load_kernels
from stepcal.kernels.forms import AllReduce, KernelConstants

__all__ = ["AllReduce", "GpuKernels", "KernelConstants", "load_kernels"]

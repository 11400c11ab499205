"""Norm + linear on the CPU: C++ kernels for every instruction set, loaded with ctypes."""

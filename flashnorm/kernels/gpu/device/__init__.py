"""What runs on the GPU: Triton kernels and the pieces they share. Importing these needs triton."""

"""Quantized layers on an NVIDIA GPU: csrc/cuda, compiled by NVRTC when a layer first needs it.

A layer's tiles are the CPU's, moved. Up to 256 tokens at a time, 512 with 8-bit activations, are
multiplied by kernels that hold activations as integers, as the CPU's do; more by cuBLAS, with the
weight unpacked to the dtype of the inputs. The first call for a kind of layer compiles, so make it
before a CUDA graph is captured; from then on calls neither wait for the GPU nor copy anything to
the host.
"""

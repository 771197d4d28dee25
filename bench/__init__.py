"""Benchmarks of the kernels and of training, against rivals at their best. See bench/README.md."""

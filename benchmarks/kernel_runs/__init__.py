"""What benchmarks/kernels.py times: lwquant's kernels and its peers', and what the machine can do."""

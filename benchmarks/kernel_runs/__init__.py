"""What benchmarks/kernels.py times: lwquant's kernels, its peers', and what the machine can do."""

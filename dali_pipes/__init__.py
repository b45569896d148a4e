"""From tiles to training tensors on NVIDIA DALI: one graph for CPU and GPU, all randomness planned outside it."""

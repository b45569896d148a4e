"""From tiles to training tensors on NVIDIA DALI: the same steps on CPU and GPU, all randomness planned outside it."""

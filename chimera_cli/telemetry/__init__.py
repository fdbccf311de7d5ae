"""The machine watched: one gate to NVML, one sampler thread."""

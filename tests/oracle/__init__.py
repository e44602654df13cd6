"""What the real libraries keep and peak at: tiny random models, run on the CPU along the code paths that CUDA takes."""

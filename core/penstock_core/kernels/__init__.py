"""Optional compiled CPU kernels and their pure-torch twins."""

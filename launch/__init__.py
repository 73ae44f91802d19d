"""Starting ranks: what the launcher told this process, torchrun children, sbatch files, grids."""

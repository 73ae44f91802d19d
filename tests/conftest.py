import torch

# pytest-xdist already uses the cores; more threads than cores make small matrices crawl.
torch.set_num_threads(1)

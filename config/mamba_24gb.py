# A Mamba-2 of 389M parameters for a card of 24 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      389M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.8 GB
#   activations  5 KB a token and layer in bf16: 32 x 1024 tokens x 36 layers = 6.1 GB
#   at the peak  17.7 GB with gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       512 sequences x 1024 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-mamba-24gb'
model = 'mamba'
size = '400m'
vram = '24'
block_size = 1024
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

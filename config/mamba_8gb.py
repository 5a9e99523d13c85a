# A Mamba-2 of 50M parameters for a card of 8 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      50M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.7 GB
#   activations  2 KB a token and layer in bf16: 32 x 1024 tokens x 24 layers = 1.7 GB
#   at the peak  4.8 GB with gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 1024 tokens = 131,072 tokens
from mambino.train import memory as fit

out_dir = 'out-mamba-8gb'
model = 'mamba'
size = '50m'
vram = '8'
block_size = 1024
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

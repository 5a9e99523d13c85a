# A Mamba-2 of 389M parameters for a card of 48 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      389M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.8 GB
#   activations  171 KB a token and layer in bf16: 1 x 4096 tokens x 36 layers = 24.0 GB
#   at the peak  30.0 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 4096 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-mamba-48gb'
model = 'mamba'
size = '400m'
vram = '48'
block_size = 4096
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

# A hybrid of 52M parameters for a card of 8 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      52M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  112 KB a token and layer in bf16: 4 x 1024 tokens x 9 layers = 4.0 GB
#   at the peak  4.9 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 1024 tokens = 131,072 tokens
from mambino.train import memory as fit

out_dir = 'out-hybrid-8gb'
model = 'hybrid'
size = '50m'
vram = '8'
block_size = 1024
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

# A hybrid of 152M parameters for a card of 12 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      152M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.3 GB
#   activations  4 KB a token and layer in bf16: 32 x 1024 tokens x 13 layers = 1.7 GB
#   at the peak  9.0 GB with gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       256 sequences x 1024 tokens = 262,144 tokens
from mambino.train import memory as fit

out_dir = 'out-hybrid-12gb'
model = 'hybrid'
size = '150m'
vram = '12'
block_size = 1024
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

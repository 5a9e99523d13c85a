# A Mamba-2 of 148M parameters for a card of 16 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      148M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.2 GB
#   activations  3 KB a token and layer in bf16: 16 x 2048 tokens x 36 layers = 3.7 GB
#   at the peak  9.4 GB with gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 2048 tokens = 262,144 tokens
from mambino.train import memory as fit

out_dir = 'out-mamba-16gb'
model = 'mamba'
size = '150m'
vram = '16'
block_size = 2048
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

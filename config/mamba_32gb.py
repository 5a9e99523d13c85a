# A Mamba-2 of 389M parameters for a card of 32 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      389M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.8 GB
#   activations  5 KB a token and layer in bf16: 16 x 2048 tokens x 36 layers = 6.1 GB
#   at the peak  17.8 GB with gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       256 sequences x 2048 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-mamba-32gb'
model = 'mamba'
size = '400m'
vram = '32'
block_size = 2048
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

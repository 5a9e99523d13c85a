# A hybrid of 399M parameters for a card of 32 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      399M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 6.0 GB
#   activations  225 KB a token and layer in bf16: 2 x 2048 tokens x 20 layers = 17.6 GB
#   at the peak  23.8 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       256 sequences x 2048 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-hybrid-32gb'
model = 'hybrid'
size = '400m'
vram = '32'
block_size = 2048
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

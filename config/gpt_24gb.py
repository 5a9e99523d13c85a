# A GPT of 396M parameters for a card of 24 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      396M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.9 GB
#   activations  79 KB a token and layer in bf16: 4 x 1024 tokens x 30 layers = 9.2 GB
#   at the peak  15.4 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       512 sequences x 1024 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-gpt-24gb'
model = 'gpt'
size = '400m'
vram = '24'
block_size = 1024
qk_norm = True
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

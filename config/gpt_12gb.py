# A GPT of 154M parameters for a card of 12 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      154M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.3 GB
#   activations  58 KB a token and layer in bf16: 4 x 1024 tokens x 20 layers = 4.5 GB
#   at the peak  7.1 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       256 sequences x 1024 tokens = 262,144 tokens
from mambino.train import memory as fit

out_dir = 'out-gpt-12gb'
model = 'gpt'
size = '150m'
vram = '12'
block_size = 1024
qk_norm = True
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

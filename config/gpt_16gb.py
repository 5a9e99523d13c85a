# A GPT of 154M parameters for a card of 16 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      154M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.3 GB
#   activations  56 KB a token and layer in bf16: 4 x 2048 tokens x 20 layers = 8.8 GB
#   at the peak  11.3 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 2048 tokens = 262,144 tokens
from mambino.train import memory as fit

out_dir = 'out-gpt-16gb'
model = 'gpt'
size = '150m'
vram = '16'
block_size = 2048
qk_norm = True
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

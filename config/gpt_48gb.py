# A GPT of 396M parameters for a card of 48 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      396M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.9 GB
#   activations  74 KB a token and layer in bf16: 4 x 4096 tokens x 30 layers = 34.6 GB
#   at the peak  40.8 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       128 sequences x 4096 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-gpt-48gb'
model = 'gpt'
size = '400m'
vram = '48'
block_size = 4096
qk_norm = True
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

# A GPT of 396M parameters for a card of 32 GB; its layers and width are in fit.py's SIZES, its steps in TRAINING.
#   at rest      396M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.9 GB
#   activations  75 KB a token and layer in bf16: 4 x 2048 tokens x 30 layers = 17.7 GB
#   at the peak  23.8 GB without gradient checkpointing, for a vocabulary of 16,384 (all counted by fit.py, not measured)
#   a step       256 sequences x 2048 tokens = 524,288 tokens
from mambino.train import memory as fit

out_dir = 'out-gpt-32gb'
model = 'gpt'
size = '400m'
vram = '32'
block_size = 2048
qk_norm = True
globals().update(fit.TRAINING[size])     # tokens a step, learning rate, steps, evaluations

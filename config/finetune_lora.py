# Tunes a finished model to other text by LoRA: its weights stay, thin matrices beside them learn.
#   rank 8 on every projection trains 1 to 2% of the parameters of a model of 50M;
#   gradients and AdamW's moments shrink as much
# first: python prepare.py more.txt --tokenizer=data/first --out=data/second  # the model's own
# then:  python train.py config/finetune_lora.py --init_from=out --dataset=second --out_dir=out-lora
# Val loss after 150 steps of 2,048 tokens, of a GPT of 1.3M parameters that has read half of
# Shakespeare, on the other half in lower case (1.947 before): all weights 1.558 (rate 3e-3) and
# 1.561 (1e-3); LoRA 1.577 (1e-2), 1.585 (2e-2) and 1.585 (5e-3, on keys too). Its checkpoint has
# 1.1 MB instead of 15.4. One seed.
adapter = 'lora'
lora_rank = 8
lora_alpha = 16.0
learning_rate = 1e-2
weight_decay = 0.0
max_iters = 300
eval_interval = 100

"""A checkpoint taught with labeled images: LoRA adapters and full fine-tuning."""

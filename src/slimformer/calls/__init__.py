"""What a model's stack and its layers are called with: arguments, masks, texts."""

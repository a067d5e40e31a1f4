"""What does llama.cpp read? One file of weights, hyperparameters and vocabulary, in the terms of its architectures."""

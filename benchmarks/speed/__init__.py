"""How fast is a whole model, at random weights of known shapes?"""

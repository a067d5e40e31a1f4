"""How good and how fast are embedding models?"""

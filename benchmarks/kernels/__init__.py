"""How fast is one operation?"""

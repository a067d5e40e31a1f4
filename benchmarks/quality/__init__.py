"""What does a decoder lose, and what does repair win back?"""

"""What becomes of long texts?"""

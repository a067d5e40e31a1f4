"""Every text model class of the installed transformers, tiny and random: is it right under a patch, or refused?"""

"""The drawings in the documents, each made from what it shows: `python -m docs.drawings [--check]`."""

"""The documents, and the program that makes what of them is made from code."""

"""The arithmetic of vramplan: values in, values out."""

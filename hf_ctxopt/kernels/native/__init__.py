"""Attention over sealed pages in C++, compiled on this machine when a long quantized cache first decodes on its CPU."""

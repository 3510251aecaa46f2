"""Attention over sealed pages in C++, compiled when a long quantized cache first decodes on this machine's CPU."""

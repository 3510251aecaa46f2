"""Pages: allocation, storage and tables. Own the bytes; know nothing of models or transformers."""

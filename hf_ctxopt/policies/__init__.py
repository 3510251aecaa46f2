"""Policies decide what is kept. They read numbers and return numbers; they never touch tensors' contents."""

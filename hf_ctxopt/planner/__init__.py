"""From a card and a model to settings that fit: what each byte is for, what to choose, and why."""

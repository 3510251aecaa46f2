"""The only rooms that know transformers' internals: names, hooks, masks, rotary modules, patches."""

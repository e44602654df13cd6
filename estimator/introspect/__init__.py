"""The part that asks the frameworks themselves. It runs in a process of its own, because a config is a stranger's input."""

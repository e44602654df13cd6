"""What torch's own caching allocator did with fixed programs, recorded: see the README beside."""
